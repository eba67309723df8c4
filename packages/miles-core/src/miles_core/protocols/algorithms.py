"""Advantages, loss terms, aggregations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch is an extra; protocols only name its Tensor
    from torch import Tensor

    from ..algorithms.segments import SegmentOps


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage is computed from; the whole batch, on the controller.

    Attributes:
        rewards: float [S], one a sample; samples of one trajectory carry the same.
        columns: Packed columns [N] by name (``versions``, ``logprobs``, ``values`` …), rolled.
        ops: Reductions; ``ops.mask`` is the loss mask.
    """

    rewards: Tensor
    columns: Mapping[str, Tensor]
    ops: SegmentOps


class Advantage(Protocol):
    """Advantages of a whole batch."""

    def __call__(self, inputs: AdvantageInputs) -> Tensor | dict[str, Tensor]:
        """[N] advantages, or several columns by name (``advantages``, ``returns``)."""
        ...


@dataclass(frozen=True)
class LossInputs:
    """What a loss term is computed from; one micro-batch, on the trainer.

    Attributes:
        logprobs: float [N] of the predicted tokens under the current weights; differentiable.
        entropy: float [N] of the distributions they come from; differentiable.
        columns: Packed columns [N] by name (``old_logprobs``, ``advantages`` …), rolled; ``logprobs`` there are the rollout's.
        ops: Reductions; ``ops.mask`` is the loss mask.
    """

    logprobs: Tensor
    entropy: Tensor
    columns: Mapping[str, Tensor]
    ops: SegmentOps


@dataclass(frozen=True)
class LossOutputs:
    """What a loss term gives.

    Attributes:
        loss: float [N], the loss of each row, before aggregation; rows outside the mask are ignored.
        metrics: float [N] each; the trainer reports their means over the trained rows of the step.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """One term of the loss; terms add up."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Loss of each row."""
        ...


class Aggregation(Protocol):
    """How rows add up to the loss of an optimizer step."""

    def __call__(self, ops: SegmentOps) -> Tensor:
        """[N] weights; the step's loss is Σ weight · loss over its trained rows."""
        ...
