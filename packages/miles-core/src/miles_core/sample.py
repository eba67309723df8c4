"""The Sample: what a policy saw, token in, token out. One schema, one alignment (DESIGN §2).

Index t of every per-token column speaks of token t, over the whole length T. A worked example, a tool turn::

    index      0    1    2     3       4        5       6      7      8
    token      Q    ?    <call> 1+1    </call>  <res>   2      ans    <eos>
    versions  −1   −1    7      7      7       −1      −1      7      7        sampled by version 7, or not sampled
    loss_mask  .    .    x      x      x        .       .      x      x        trained
    logprobs  nan  nan  −.1   −1.2   −.0      nan     nan    −.3    −.0        of token t, when it was sampled

Text is a view of it. There are no response-only arrays anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import COLUMNS, Attachments, Column, Ragged, check_column, column_spec, concat_columns, empty_column, slice_column
from .errors import DataError

if TYPE_CHECKING:
    from .refs import SampleRef


class Status(StrEnum):
    """How a sample ended."""

    COMPLETED = "completed"
    """The policy or the environment finished it."""
    TRUNCATED = "truncated"
    """A length or turn limit cut it; it is scored."""
    ABORTED = "aborted"
    """Generation was interrupted and may be continued."""
    FAILED = "failed"
    """Infrastructure failed; it is issued again, never scored."""


@dataclass(frozen=True)
class SampleId:
    """Which sample this is.

    Attributes:
        run: The run's name.
        policy: The model that is trained on it.
        prompt: The prompt's id in its data source.
        group: The trajectories of one prompt in one epoch share this.
        trajectory: Index of the trajectory in its group. Statistics run over trajectories.
        branch: Index of the sample in its trajectory (branches of a conversation, compacted contexts, sub-agents).
        attempt: How often the trajectory had been issued before (after infrastructure failures).
    """

    run: str
    policy: str
    prompt: str
    group: str
    trajectory: int = 0
    branch: int = 0
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.policy}/{self.group}/t{self.trajectory}.b{self.branch}@{self.attempt}"


@dataclass(frozen=True)
class SamplingSpan:
    """Tokens ``start`` to ``end`` (exclusive) were sampled with these settings."""

    start: int
    end: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: unrestricted."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: str | None = None

    @property
    def penalised(self) -> bool:
        """Whether logits were changed by what had been said before; no recorded support rebuilds that."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def unrestricted(self) -> bool:
        """Whether every token could be drawn with its softmax probability at this temperature."""
        whole = self.top_p >= 1 and self.top_k == 0 and self.min_p == 0 and self.grammar is None
        return whole and self.temperature > 0 and not self.penalised


@dataclass(frozen=True)
class Turn:
    """Tokens ``start`` to ``end`` (exclusive) were spoken by ``role`` (user, assistant, tool, or an agent's name)."""

    role: str
    start: int
    end: int


@dataclass
class Sample:
    """One token sequence with its columns and everything known about it.

    Attributes:
        id: Which sample this is.
        columns: By name, see ``miles_core.columns.COLUMNS``; ``tokens``, ``versions``, ``loss_mask`` and ``logprobs``
            are there for every sample (also as properties).
        prompt: The prompt as its data source gave it (text or messages).
        label: What a reward compares with.
        reward: One number for the trajectory, set by scoring; None before. Higher is better.
        rewards: The reward's named parts, before weighting.
        status: How it ended.
        spans: Sampling settings of the sampled tokens, in order, without overlap.
        turns: Who spoke which tokens, in order.
        metadata: Anything else that survives JSON.
        timings: Seconds by name (queue, prefill, generate, environment, reward).
    """

    id: SampleId
    columns: dict[str, Column]
    prompt: Any = None
    label: Any = None
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    status: Status = Status.COMPLETED
    spans: list[SamplingSpan] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(
        id: SampleId,
        tokens: Sequence[int] | np.ndarray,
        *,
        versions: Sequence[int] | np.ndarray | None = None,
        loss_mask: Sequence[bool] | np.ndarray | None = None,
        logprobs: Sequence[float] | np.ndarray | None = None,
        columns: dict[str, Column] | None = None,
        **fields: Any,
    ) -> Sample:
        """Build a sample from plain lists. Columns that are not given hold their fill: nothing sampled, nothing trained."""
        given = {"tokens": tokens, "versions": versions, "loss_mask": loss_mask, "logprobs": logprobs}
        built: dict[str, Column] = {}
        for name, values in given.items():
            spec = column_spec(name)
            built[name] = empty_column(spec, len(tokens)) if values is None else np.asarray(values, dtype=spec.dtypes[0])
        return Sample(id, built | (columns or {}), **fields)

    @staticmethod
    def answer(
        id: SampleId,
        prompt_tokens: Sequence[int],
        tokens: Sequence[int],
        logprobs: Sequence[float],
        *,
        version: int,
        temperature: float = 1.0,
        **fields: Any,
    ) -> Sample:
        """A single turn: a prompt, and an answer that weights of ``version`` sampled and that is trained.

        Args:
            id: Which sample.
            prompt_tokens: At least one.
            tokens: What was sampled.
            logprobs: Of each of them, under the distribution at ``temperature``.
            version: Weight version that sampled them.
            temperature: What the logits were divided by.
            fields: ``reward``, ``prompt``, ``label``, ``status``, ``metadata`` …
        """
        p, n = len(prompt_tokens), len(tokens)
        return Sample.of(
            id,
            [*prompt_tokens, *tokens],
            versions=[-1] * p + [version] * n,
            loss_mask=[False] * p + [True] * n,
            logprobs=[np.nan] * p + list(logprobs),
            spans=[SamplingSpan(p, p + n, temperature)] if n else [],
            turns=[Turn("user", 0, p)] + ([Turn("assistant", p, p + n)] if n else []),
            **fields,
        )

    def __len__(self) -> int:
        return len(self.columns["tokens"])

    def _token_column(self, name: str) -> np.ndarray:
        column = self.columns.get(name)
        if not isinstance(column, np.ndarray):
            raise DataError(f"sample {self.id}: column {name!r} is missing")
        return column

    @property
    def tokens(self) -> np.ndarray:
        """int32 [T]."""
        return self._token_column("tokens")

    @property
    def versions(self) -> np.ndarray:
        """int32 [T], −1 where not sampled."""
        return self._token_column("versions")

    @property
    def loss_mask(self) -> np.ndarray:
        """bool [T]."""
        return self._token_column("loss_mask")

    @property
    def logprobs(self) -> np.ndarray:
        """float32 [T], NaN where not sampled."""
        return self._token_column("logprobs")

    @property
    def n_sampled(self) -> int:
        """Tokens that the policy itself sampled."""
        return int((self.versions >= 0).sum())

    def temperatures(self) -> np.ndarray:
        """float32 [T]: the temperature token t was sampled at; 1 where not sampled."""
        out = np.ones(len(self), np.float32)
        for span in self.spans:
            out[span.start : span.end] = span.temperature
        return out

    def slice(self, start: int, end: int) -> Sample:
        """Tokens ``start`` to ``end`` (0 ≤ start < end ≤ T) as a sample of its own; spans and turns are clipped."""
        if not 0 <= start < end <= len(self):
            raise DataError(f"sample {self.id}: cannot cut out tokens [{start}, {end}) of {len(self)}")
        columns = {n: slice_column(column_spec(n), c, start, end) for n, c in self.columns.items()}

        def clip(items: Iterable[Any]) -> list[Any]:
            kept = (replace(i, start=max(i.start, start) - start, end=min(i.end, end) - start) for i in items)
            return [i for i in kept if i.end > i.start]

        return replace(self, columns=columns, spans=clip(self.spans), turns=clip(self.turns))

    @staticmethod
    def concat(parts: Sequence[Sample]) -> Sample:
        """Parts of one sample, one after another (an aborted sample and its continuation). Scalars come from the last."""
        names = list(dict.fromkeys(n for p in parts for n in p.columns))
        columns: dict[str, Column] = {}
        for name in names:
            like = next(p.columns[name] for p in parts if name in p.columns)
            spec = column_spec(name)
            columns[name] = concat_columns(spec, [p.columns.get(name, empty_column(spec, len(p), like)) for p in parts])
        starts = np.cumsum([0] + [len(p) for p in parts])[:-1].tolist()

        def shift(field_name: str) -> list[Any]:
            shifted = ((i, s) for p, s in zip(parts, starts, strict=True) for i in getattr(p, field_name))
            return [replace(i, start=i.start + s, end=i.end + s) for i, s in shifted]

        return replace(parts[-1], columns=columns, spans=shift("spans"), turns=shift("turns"))

    def validate(self, *, vocab_size: int | None = None, rl: bool = True) -> None:
        """Raise a DataError that names this sample and the column if a promise of the schema is broken.

        Args:
            vocab_size: If given, token ids must be below it.
            rl: Whether trained tokens must have been sampled, from a distribution the trainer can rebuild
                (SFT, DPO and reward models train on tokens nobody sampled).
        """
        for problem in self._problems(vocab_size, rl):
            raise DataError(f"sample {self.id}: {problem}")

    def _problems(self, vocab_size: int | None, rl: bool) -> Iterable[str]:
        for name in ("tokens", "versions", "loss_mask", "logprobs"):
            if name not in self.columns:
                yield f"column {name!r} is missing"
        if len(self) == 0:
            yield "column 'tokens' is empty; a sample has at least one token"
        for name, column in self.columns.items():
            if name not in COLUMNS:
                yield f"column {name!r} is not declared; known: {', '.join(COLUMNS)}. A plug-in declares new ones with register_column"
            if problem := check_column(column_spec(name), column, len(self)):
                yield f"column {name!r} {problem}"
        yield from self._token_problems(vocab_size)
        yield from self._span_problems()
        if rl:
            yield from self._training_problems()
        if self.reward is not None and not np.isfinite(self.reward):
            yield f"reward is {self.reward}; a reward is a finite number"

    def _token_problems(self, vocab_size: int | None) -> Iterable[str]:
        tokens, versions, logprobs = self.tokens, self.versions, self.logprobs
        wrong = (tokens < 0) | (tokens >= (vocab_size or np.iinfo(np.int32).max))
        if wrong.any():
            limit = f"below the vocabulary size {vocab_size}" if vocab_size else "non-negative"
            yield f"column 'tokens' holds id {tokens[wrong][0]} at index {wrong.argmax()}; ids must be {limit}"
        sampled = versions >= 0
        if versions.min() < -1:
            yield f"column 'versions' holds {versions.min()}; −1 means not sampled, versions start at 0"
        if sampled[0] or self.loss_mask[0]:
            column = "versions" if sampled[0] else "loss_mask"
            yield f"column {column!r} marks token 0, but nothing predicts the first token; start with a prompt or a BOS token"
        wrong = np.isnan(logprobs) == sampled
        if wrong.any():
            found = "NaN though the token was sampled" if sampled[wrong][0] else "a number though the token was not sampled"
            yield f"column 'logprobs' is {found} at index {wrong.argmax()} (versions there: {versions[wrong][0]})"
        wrong = sampled & ((logprobs > 1e-4) | np.isinf(logprobs))
        if wrong.any():
            yield f"column 'logprobs' holds {logprobs[wrong][0]:.4g} at index {wrong.argmax()}; a log-probability is finite and at most 0"
        routing = self.columns.get("routing")
        if isinstance(routing, np.ndarray) and (routing[-1] != np.iinfo(routing.dtype).max).any():
            yield "column 'routing' has a recorded last row; token T−1 was never an input, its row must be the sentinel"

    def _span_problems(self) -> Iterable[str]:
        for kind, items in (("sampling span", self.spans), ("turn", self.turns)):
            end = 0
            for item in items:
                if not end <= item.start < item.end <= len(self):
                    yield f"{kind} [{item.start}, {item.end}) is empty, out of order, overlapping or outside [0, {len(self)})"
                end = item.end

    def _training_problems(self) -> Iterable[str]:
        trained = self.loss_mask
        unsampled = trained & (self.versions < 0)
        if unsampled.any():
            at = unsampled.argmax()
            yield f"column 'loss_mask' trains index {at}, which was not sampled (versions −1); RL trains sampled tokens only"
        covered = np.zeros(len(self), bool)
        for span in self.spans:
            here = slice(span.start, span.end)
            covered[here] = True
            if not trained[here].any():
                continue
            where = f"column 'loss_mask' trains tokens of the span [{span.start}, {span.end})"
            if span.temperature <= 0:
                yield f"{where} sampled greedily; RL needs temperature > 0"
            elif span.penalised:
                yield f"{where} sampled with penalties, a distribution the trainer cannot rebuild; sample without"
            elif not span.unrestricted:
                lacking = span.start + np.flatnonzero(trained[here] & ~self._in_support()[here])
                if len(lacking):
                    yield (
                        f"{where} whose support was restricted (top_p, top_k, min_p or grammar), but column 'support' does not hold "
                        f"the sampled token {self.tokens[lacking[0]]} at index {lacking[0]}; record it or sample unrestricted"
                    )
        bare = trained & ~covered
        if bare.any():
            yield f"column 'loss_mask' trains index {bare.argmax()}, which no sampling span covers"

    def _in_support(self) -> np.ndarray:
        """bool [T]: whether the recorded support of token t holds token t; False without a 'support' column."""
        support = self.columns.get("support")
        if not isinstance(support, Ragged):
            return np.zeros(len(self), bool)
        owner = np.repeat(np.arange(len(self)), np.diff(support.offsets))
        return np.bincount(owner, weights=support.values == self.tokens[owner], minlength=len(self)) > 0


@dataclass
class Group:
    """The trajectories of one prompt, delivered together. One trajectory may hold several samples."""

    id: str
    samples: list[Sample]

    def trajectories(self) -> dict[int, list[Sample]]:
        """Samples by trajectory, branches in order."""
        out: dict[int, list[Sample]] = {}
        for sample in sorted(self.samples, key=lambda s: (s.id.trajectory, s.id.branch)):
            out.setdefault(sample.id.trajectory, []).append(sample)
        return out

    def rewards(self) -> dict[str, list[float]]:
        """For each policy, one reward a trajectory; several samples of a trajectory must agree or be partly unset."""
        out: dict[str, list[float]] = {}
        for samples in self.trajectories().values():
            for policy in dict.fromkeys(s.id.policy for s in samples):
                out.setdefault(policy, []).append(trajectory_reward([s for s in samples if s.id.policy == policy]))
        return out


def trajectory_reward(samples: Sequence[Sample | SampleRef]) -> float:
    """The one reward of a trajectory's samples of one policy."""
    rewards = {s.reward for s in samples if s.reward is not None}
    if len(rewards) != 1:
        raise DataError(
            f"trajectory of sample {samples[0].id}: expected one reward, found {sorted(rewards) or 'none'}. "
            "A trajectory's reward counts once, so all its samples carry the same number."
        )
    return rewards.pop()


__all__ = ["Attachments", "Group", "Ragged", "Sample", "SampleId", "SamplingSpan", "Status", "Turn", "trajectory_reward"]
