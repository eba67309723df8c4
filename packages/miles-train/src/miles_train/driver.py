"""The step of every trainer: over optimizer steps, from a loaded batch to a report. Where the model is, is another's matter (``Driver``).

    batch = load_columns(batch)                      the columns the model reads, checked
    for each optimizer step:
        found = gradients(samples that count)        losses, log-probabilities, the gradient's norm
        first: mismatch, gates
        loss, norm and gates are in order, or the step is refused
        apply(lr, norm)

A micro-batch's loss is its exact share of the optimizer step's loss (SegmentOps.share), so gradients are sums over micro-batches and ranks,
however the step was cut up, and nothing has changed before loss, gradient and gates were looked at.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from miles_core.batch import Batch
from miles_core.errors import ConfigError, RanksLost, RunError, StepRefused
from miles_core.plan import unit_of_all, units_of
from miles_core.protocols import BuildContext, StepReport, Unit

from .gates import check_gates
from .mismatch import fresh_rows, mismatch_of
from .plugins import AdamWTrainerConfig
from .routing import own_routing, routing_metrics
from .schedule import learning_rate
from .steps import kept_samples, step_metrics

ENOUGH = 1024
"""Tokens of the present weights of which the mismatch is known well enough; samples without advantage help out up to there."""


@dataclass(frozen=True)
class Gradients:
    """What is known of an optimizer step whose gradient was computed.

    Attributes:
        metrics: The step's loss and metrics, shares of all micro-batches added up.
        norm: L2 norm of the gradient.
        logprobs: float32 [N] of the trained rows, anything elsewhere; None of models with a scalar head.
        routing: Counts of (row, MoE layer) pairs as ``routing_metrics`` takes them; empty without replay.
    """

    metrics: dict[str, float]
    norm: float
    logprobs: np.ndarray | None
    routing: Mapping[str, float] = field(default_factory=dict)


class Driver(ABC):
    """A trainer whose model is somewhere: a subclass says how it is asked. Such calls come one at a time.

    Attributes:
        version: Version of the weights, as published. The loop sets it after each publish.
        optimizer_steps: Optimizer steps taken since the model's starting weights.
        unit: Samples of one unit share a micro-batch: those of a trajectory, or of a group where a loss is a function of pairs or groups.
    """

    name: ClassVar[str]
    """Of the trainer in recipes."""

    def __init__(self, config: AdamWTrainerConfig, context: BuildContext, *, dtype: str, skips: bool) -> None:
        """``dtype``: of the forward pass; ``skips``: leave samples without advantage out where no loss could tell."""
        if context.model_path is None:
            raise ConfigError(f"trainer {self.name!r} was given no model; set the model's path to a Hugging Face directory")
        if context.losses and context.aggregation is None:
            raise ConfigError(f"model {context.model!r} has losses but no aggregation; set one, e.g. token_mean")
        if context.losses and config.schedule != "constant" and context.total_steps < 1:
            raise ConfigError(
                f"schedule: {config.schedule} ends with the stage, but the stage's number of steps is not known; use constant"
            )
        self.config = config
        self.context = context
        self.version = 0
        self.optimizer_steps = 0
        self.unit: Unit = unit_of_all(loss.unit for loss in context.losses.values())
        self._dtype = dtype
        self._skips = skips and all(loss.proportional_to_advantage for loss in context.losses.values())

    # ---- what a subclass says

    @abstractmethod
    def gives(self) -> frozenset[str]:
        """Batch columns that the model can annotate."""

    @abstractmethod
    async def load_columns(self, batch: Batch) -> Batch:
        """The batch with the columns that the model reads. Raises DataError, naming the sample, where they do not fit."""

    @abstractmethod
    async def outputs(self, batch: Batch, *, own_routing: bool = False) -> np.ndarray:
        """float32 [N] of a loaded batch under the present weights: log-probabilities of the predicted tokens (or values), NaN where there
        is nothing to say. With ``own_routing`` routers choose for themselves, whatever was recorded."""

    @abstractmethod
    async def gradients(self, part: Batch, *, once: bool) -> Gradients:
        """The gradient of (a part of) an optimizer step; it stays with the model until ``apply`` or the next call.

        Args:
            part: Samples, loaded, with the step's denominators.
            once: ``old_logprobs`` that nobody annotated are what this pass says.

        Raises:
            RunError: A loss is not finite; names the sample.
        """

    @abstractmethod
    async def apply(self, lr: float, norm: float) -> None:
        """One AdamW step with the gradient that is there, whose norm is ``norm``."""

    def begin(self) -> None:  # noqa: B027 — most have nothing to do then
        """A call begins that the loop waits for."""

    # ---- what the loop calls

    async def annotate(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """Add what the model says under the present weights.

        Args:
            batch: Any samples.
            columns: Of a language model ``old_logprobs``, ``ref_logprobs`` and ``teacher_logprobs``: log-probabilities at the
                temperatures the tokens were sampled at, each the same float32 [N], NaN where there is nothing to say: on the last
                row of a sample, and where the token was taken greedily. Of a critic or reward model ``values``: float32 [N], a
                number on every row.

        Raises:
            ConfigError: Another column is asked for.
            DataError: A token id is outside the vocabulary, or a sample's routing cannot be replayed.
        """
        if strange := sorted(columns - self.gives()):
            raise ConfigError(
                f"a {self.context.role} of trainer {self.name!r} cannot give {strange[0]!r}, only {', '.join(sorted(self.gives()))}; "
                "take it from another model"
            )
        if not columns:
            return batch
        self.begin()
        annotated = await self.outputs(await self.load_columns(batch))
        return batch.with_columns({name: annotated for name in sorted(columns)})

    async def step(self, batch: Batch) -> StepReport:
        """Train on ``batch.optimizer_steps()`` in order; a step in which no token is trained is passed over.

        Metrics: ``loss`` and ``loss/<term>``, ``entropy`` or ``values`` (mean over trained tokens), ``grad_norm`` (before clipping)
        and what the losses report (means over trained tokens), all averaged over the optimizer steps; ``tokens``, trained in all
        of them; ``lr`` of the last; ``seconds/forward_backward``; and of language models what ``mismatch_of`` says of the
        first optimizer step's trained tokens, before any update. ``gates`` bound the latter. Of a mixture of experts also what
        ``routing_metrics`` says, and with ``compare_routing`` the mismatch without replay. Where samples without advantage may be
        skipped, ``skipped`` is the share of the trained tokens that were; losses are of all of them, means of the others, and the
        mismatch of the others and as many of the skipped as it takes to compare ``ENOUGH`` fresh tokens (in bitwise mode all).

        A batch for one optimizer step needs no ``old_logprobs``: where they are not annotated, they are what this pass says. They
        are reported as a column.

        The schedule counts optimizer steps; it ends at ``context.total_steps`` × the optimizer steps of this call.

        Raises:
            ConfigError: The model has no loss.
            DataError: A token id is outside the vocabulary, or a sample needs what this trainer cannot do.
            StepRefused: Loss or gradient is not finite (names the sample) or a gate is out of bounds in the first optimizer step,
                or no token is trained: nothing has changed.
            RunError: Loss or gradient is not finite in a later one; the weights are those before that optimizer step.
            RanksLost: A rank died, failed or was silent.
        """
        self.check_trained()
        self.begin()
        batch = await self.load_columns(batch)
        once, end = len(batch.steps) == 1, self.context.total_steps * len(batch.steps)
        reports: list[dict[str, float]] = []
        first: dict[str, float] = {}
        columns: dict[str, np.ndarray] = {}
        routing: Counter[str] = Counter()
        seconds = 0.0
        for samples, minibatch in zip(batch.steps, batch.optimizer_steps(), strict=True):
            if minibatch.segments.tokens == 0:
                continue
            start = time.perf_counter()
            kept = kept_samples(minibatch, self.unit, self._skips)
            part = minibatch.select(kept)
            try:
                found = await self.gradients(part, once=once)
                if not reports and found.logprobs is not None:
                    if once:
                        columns["old_logprobs"] = _spread(batch, samples[kept], np.where(part.array("loss_mask"), found.logprobs, np.nan))
                    first = await self._mismatch(minibatch, kept, part, found.logprobs)
                lr = learning_rate(self.config, self.optimizer_steps, end)
                seconds += time.perf_counter() - start
                if not np.isfinite(found.norm):
                    raise RunError(f"the gradient's norm is {found.norm}, though the loss is finite{await self._origin(part)}")
            except RanksLost:
                raise
            except RunError as error:
                refusal = RunError if reports else StepRefused
                raise refusal(f"optimizer step {self.optimizer_steps + 1}: {error}. The weights are those before it.") from error
            await self.apply(lr, found.norm)
            self.optimizer_steps += 1
            routing.update(found.routing)
            reports.append(self._means(found.metrics, part) | {"grad_norm": found.norm, "lr": lr, "tokens": minibatch.segments.tokens})
        metrics = step_metrics(reports, seconds) | first
        if routing:
            metrics |= routing_metrics(routing["differs"], routing["replayed"], routing["rows"])
        return StepReport(metrics, len(reports), columns)

    # ---- parts of it

    def check_trained(self) -> None:
        """Raise a ConfigError if the model has no loss."""
        if not self.context.losses:
            raise ConfigError(f"model {self.context.model!r} has no loss, so it is not trained; give it one")

    @property
    def counters(self) -> dict[str, int]:
        """What a checkpoint says beside tensors."""
        return {"optimizer_steps": self.optimizer_steps, "version": self.version}

    @counters.setter
    def counters(self, saved: Mapping[str, Any]) -> None:
        self.optimizer_steps, self.version = saved["optimizer_steps"], saved["version"]

    async def _mismatch(self, minibatch: Batch, kept: np.ndarray, part: Batch, said: np.ndarray) -> dict[str, float]:
        """The mismatch before any update, within its gates.

        Args:
            minibatch: The first optimizer step.
            kept: int64, the samples of it that went through the model.
            part: These samples.
            said: float32 [N] of ``part``, the log-probabilities of its trained rows.
        """
        compared, logprobs = await self._with_fresh(minibatch, kept, part, said)
        mismatch = mismatch_of(compared, logprobs, self.version)
        check_gates(mismatch, self.config.gates, self._dtype, self.context.bitwise)
        if self.config.compare_routing and "routing" in compared.columns:
            without = await self.outputs(compared, own_routing=True)
            mismatch |= own_routing(mismatch_of(compared, without, self.version))
        return mismatch

    async def _with_fresh(self, minibatch: Batch, kept: np.ndarray, part: Batch, said: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The samples whose mismatch is looked at, and their log-probabilities [N] of trained rows: those that are ``kept``, and of the
        skipped ones as many as it takes to compare ``ENOUGH`` tokens of these weights, in bitwise mode all."""
        fresh = np.bincount(minibatch.segment[fresh_rows(minibatch, self.version)], minlength=len(minibatch))
        skipped = np.setdiff1d(np.flatnonzero(fresh), kept)
        before = fresh[kept].sum() + np.cumsum(fresh[skipped]) - fresh[skipped]
        more = skipped if self.context.bitwise else skipped[before < ENOUGH]
        if not len(more):
            return part, said
        logprobs = _spread(minibatch, kept, said)
        logprobs[minibatch.rows_of(more)] = await self.outputs(minibatch.select(more))
        compared = np.sort(np.r_[kept, more])
        return minibatch.select(compared), logprobs[minibatch.rows_of(compared)]

    def _means(self, metrics: dict[str, float], part: Batch) -> dict[str, float]:
        """Metrics of an optimizer step of which ``part`` went through the model: but for losses, means over its trained tokens."""
        if not self._skips:
            return metrics
        share = part.segments.sequence_tokens.sum() / part.segments.tokens
        return {name: x if name.split("/")[0] == "loss" else x / share for name, x in metrics.items()} | {"skipped": 1.0 - share}

    async def _origin(self, part: Batch) -> str:
        """Whose gradient is not finite. Every unit is computed again, alone: only a step that is refused pays for that."""
        units = units_of(part, self.unit)
        for unit in np.unique(units):
            alone = part.select(np.flatnonzero(units == unit))
            if not np.isfinite((await self.gradients(alone, once=True)).norm):
                ids = [str(ref.id) for ref in alone.refs]
                return f"; it comes from {'sample' if len(ids) == 1 else 'one of the samples'} {', '.join(ids)}"
        return ", and so is each sample's own gradient: only their sum is not"


def _spread(batch: Batch, samples: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float32 [N]: values on the rows of some samples, NaN elsewhere."""
    column = np.full(batch.n_rows, np.nan, np.float32)
    column[batch.rows_of(samples)] = values
    return column
