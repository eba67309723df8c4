"""Putting a Sample together turn by turn: inject text, append what an engine sampled, finish. For rollout functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .columns import Column, Ragged
from .protocols import Generation, SamplingParams, Tokenizer
from .sample import Sample, SampleId, SamplingSpan, Status, Turn


class SampleBuilder:
    """Grows a sample; token t's columns are set when token t is added and never touched again.

    Example::

        builder = SampleBuilder(id, tokenizer)
        builder.inject(prompt.text, role="user")
        builder.append(await engine.generate(GenerateRequest(str(id), builder.tokens, sampling, key)), sampling)
        sample = builder.finish(Status.COMPLETED, prompt=prompt.text)
    """

    def __init__(self, id: SampleId, tokenizer: Tokenizer):
        self.id = id
        self.tokenizer = tokenizer
        self.sampled = 0
        """Tokens the policy sampled so far."""
        self._tokens: list[int] = []
        self._versions: list[int] = []
        self._logprobs: list[float] = []
        self._trained: list[bool] = []
        self._turns: list[Turn] = []
        self._spans: list[SamplingSpan] = []
        self._support: dict[int, list[int]] = {}
        self._routing: np.ndarray | None = None  # [recorded rows, L, K]
        self._prompt_tokens = 0

    @property
    def tokens(self) -> np.ndarray:
        """int32 [T]: the context so far."""
        return np.array(self._tokens, np.int32)

    @property
    def routing_rows(self) -> int:
        """Routing rows that are recorded already."""
        return 0 if self._routing is None else len(self._routing)

    def inject(self, text: str, *, role: str, trained: bool = False) -> None:
        """Add tokens that the policy did not sample. ``trained``: a demonstration's target (SFT)."""
        self.inject_ids(encode(self.tokenizer, text, add_special_tokens=not self._tokens), role=role, trained=trained)

    def inject_ids(self, ids: Sequence[int], *, role: str, trained: bool = False) -> None:
        """``inject`` for text that is tokenised already."""
        if not ids:
            return
        if not self._tokens:
            self._prompt_tokens = len(ids)
        self._turns.append(Turn(role, len(self._tokens), len(self._tokens) + len(ids)))
        self._tokens += ids
        self._versions += [-1] * len(ids)
        self._logprobs += [np.nan] * len(ids)
        self._trained += [trained] * len(ids)

    def append(self, generation: Generation, sampling: SamplingParams, *, role: str = "assistant") -> None:
        """Add what the policy sampled after ``tokens``, as trained tokens."""
        start, n = len(self._tokens), len(generation.tokens)
        if generation.routing is not None:
            self._routing = generation.routing if self._routing is None else np.concatenate([self._routing, generation.routing])
        if n == 0:
            return
        self._tokens += generation.tokens.tolist()
        self._versions += generation.versions.tolist()
        self._logprobs += generation.logprobs.tolist()
        self._trained += [True] * n
        self._turns.append(Turn(role, start, start + n))
        self._spans.append(sampling.span(start, start + n))
        if generation.support is not None:
            self._support |= {start + i: ids for i, ids in enumerate(generation.support)}
        self.sampled += n

    def text(self, start: int = 0) -> str:
        """Text of the tokens from ``start`` on."""
        return self.tokenizer.decode(self._tokens[start:])

    def finish(self, status: Status, **fields: Any) -> Sample:
        """The sample. ``metadata["response"]`` is the text of everything after the first injected piece (the prompt)."""
        columns: dict[str, Column] = {}
        if self._routing is not None:
            column = np.full((len(self._tokens), *self._routing.shape[1:]), np.iinfo(self._routing.dtype).max, self._routing.dtype)
            rows = min(len(self._routing), len(self._tokens) - 1)  # row T−1 is never recorded
            column[:rows] = self._routing[:rows]
            columns["routing"] = column
        if self._support:
            columns["support"] = Ragged.of([self._support.get(t, []) for t in range(len(self._tokens))], "int32")
        metadata = {"response": self.text(self._prompt_tokens)} | fields.pop("metadata", {})
        return Sample.of(
            self.id,
            self._tokens,
            versions=self._versions,
            loss_mask=self._trained,
            logprobs=self._logprobs,
            columns=columns,
            status=status,
            spans=self._spans,
            turns=self._turns,
            metadata=metadata,
            **fields,
        )


def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Ids of a text. Those met last are remembered: a prompt comes once for each trajectory of its group."""
    return _encoded(_Itself(tokenizer), text, add_special_tokens)


@dataclass(frozen=True, eq=False)
class _Itself:
    """A tokenizer as a key: equal to itself alone, whatever it thinks of others."""

    tokenizer: Tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.tokenizer is other.tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)


@lru_cache(maxsize=256)
def _encoded(itself: _Itself, text: str, add_special_tokens: bool) -> tuple[int, ...]:
    return tuple(itself.tokenizer.encode(text, add_special_tokens=add_special_tokens))
