"""What is asked of a model in this process: columns, or the gradient of an optimizer step, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from miles_core.batch import Batch
from miles_core.errors import MilesError, RunError
from miles_core.moe import experts
from miles_core.plan import unit_of_all, units_of
from miles_core.protocols import Aggregation, BuildContext, LossTerm, Unit

from ..plugins import TorchTrainerConfig
from .causal_lm import CausalLM
from .layouts import MicroBatch
from .model import PackedModel
from .objective import shares
from .routing_replay import RoutingReplay
from .scalar_model import ScalarModel

MODELS: dict[str, type[PackedModel]] = {"critic": ScalarModel, "reward": ScalarModel}
"""What a model of a role is; all others are language models."""


def build_model(config: TorchTrainerConfig, context: BuildContext, dtype: torch.dtype, device: torch.device, trained: bool) -> PackedModel:
    """The model of a role, as the options want it."""
    assert context.model_path is not None
    kind = MODELS.get(context.role, CausalLM)
    model = kind(context.model_path, dtype, device, config.layout, context.bitwise, context.lora)
    if config.recompute and trained:
        model.recompute()
    if config.routing_replay and context.role == "policy" and experts(model.hf):
        model.replay = RoutingReplay(model.hf)
    return model


class Together(Protocol):
    """Other ranks that hold parts of the same weights: all of them must pass forward and backward equally often."""

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        ...

    def before_pass(self, *, last: bool) -> None:
        """A forward pass comes, the last of a call or not."""
        ...

    def after_passes(self) -> None:
        """A call's last pass is done."""
        ...


@dataclass
class Found:
    """What passes over (a rank's part of) an optimizer step found.

    Attributes:
        metrics: Shares of the step's loss and metrics; they add up over ranks.
        logprobs: float32 [N] of the trained rows, NaN elsewhere; None of models with a scalar head.
        routing: Counts as ``routing_metrics`` takes them; they add up over ranks.
        complaint: Where the loss is not to be trained on: why.
    """

    logprobs: np.ndarray | None
    metrics: dict[str, float] = field(default_factory=dict)
    routing: dict[str, float] = field(default_factory=dict)
    complaint: MilesError | None = None


class Passes:
    """A model and its loss.

    Attributes:
        model: The model.
        unit: See ``Driver``.
    """

    def __init__(
        self,
        model: PackedModel,
        losses: Mapping[str, LossTerm],
        aggregation: Aggregation | None,
        max_tokens: int,
        together: Together | None = None,
    ) -> None:
        self.model = model
        self.unit: Unit = unit_of_all(loss.unit for loss in losses.values())
        self._losses, self._aggregation, self._max_tokens, self._together = losses, aggregation, max_tokens, together

    @torch.no_grad()
    def outputs(self, batch: Batch, *, own_routing: bool = False, real: bool = True) -> np.ndarray:
        """See ``Driver.outputs``; ``real`` as below."""
        column = np.full(batch.n_rows, np.nan, np.float32)
        with self.model.replay.off() if self.model.replay and own_routing else nullcontext():
            for micro in self._passed(batch, np.arange(len(batch)), real):
                if not len(micro.samples):
                    self._idle(micro)
                    continue
                rows = self.model.rows_to_annotate(micro.batch)
                column[batch.rows_of(micro.samples)[rows]] = self.model.outputs(micro, rows)[self.model.annotated].cpu().numpy()[rows]
        return column

    def gradients(self, batch: Batch, *, once: bool, real: bool = True) -> Found:
        """Add the gradient of the samples' shares of an optimizer step to what there is.

        A loss that is not finite stops nothing: other ranks may be in the middle of collectives with this one.

        Args:
            batch: Samples, loaded, with the step's denominators.
            once: ``old_logprobs`` that nobody annotated are what this pass says.
            real: Whether the samples are any, or only stand for none (``sharding``).
        """
        if self.model.replay:
            self.model.replay.reset()
        found = Found(np.full(batch.n_rows, np.nan, np.float32) if self.model.annotated == "logprobs" else None)
        sums: dict[str, Tensor] = {}
        for micro in self._passed(batch, units_of(batch, self.unit), real):
            if not len(micro.samples):
                self._idle(micro).backward()
                continue
            rows = np.flatnonzero(micro.batch.array("loss_mask"))
            outputs = self.model.outputs(micro, rows)
            self._loss(micro, outputs, once, found, sums).backward()
            if found.logprobs is not None:
                found.logprobs[batch.rows_of(micro.samples)[rows]] = outputs["logprobs"].detach().cpu().numpy()[rows]
        found.metrics = {name: float(x) for name, x in sums.items()}
        found.routing = self.model.replay.finish() if self.model.replay else {}
        return found

    def _passed(self, batch: Batch, units: np.ndarray, real: bool) -> Iterator[MicroBatch]:
        """Micro-batches, each to be passed before the next is taken; without samples where only other ranks have any left."""
        own = self.model.micro_batches(batch, units, self._max_tokens) if real else []
        if self._together is None:
            yield from own
            return
        number = self._together.most(len(own))
        for i in range(number):
            self._together.before_pass(last=i == number - 1)
            yield own[i] if i < len(own) else MicroBatch.without_samples(batch)
        self._together.after_passes()

    def _loss(self, micro: MicroBatch, outputs: Mapping[str, Tensor], once: bool, found: Found, sums: dict[str, Tensor]) -> Tensor:
        """The micro-batch's share of the loss; its metrics are added to ``sums``, a complaint is noted."""
        assert self._aggregation is not None
        try:
            loss, parts, complaint = shares(micro.batch, outputs, self._losses, self._aggregation, once=once)
        except MilesError as error:
            found.complaint = found.complaint or error
            return 0.0 * next(iter(outputs.values())).sum()
        if complaint and found.complaint is None:
            found.complaint = RunError(complaint)
        for name, x in parts.items():
            sums[name] = sums[name] + x if name in sums else x
        return loss

    def _idle(self, micro: MicroBatch) -> Tensor:
        """A pass over a row that nobody asks for; a sum of no numbers, to go backward from."""
        with self.model.replay.off() if self.model.replay else nullcontext():
            outputs = self.model.outputs(micro, np.zeros(0, np.int64))
        return 0.0 * torch.stack([x.sum() for x in outputs.values()]).sum()
