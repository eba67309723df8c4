"""Advantages, loss terms, KL estimators, corrections, aggregations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:  # torch is an extra; protocols only name its Tensor
    from torch import Tensor

    from ..algorithms.segments import SegmentOps

Unit = Literal["token", "sequence", "pair", "group"]
"""What a loss is a function of. Tokens and sequences stay with their trajectory; pairs and groups with their group."""


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage is computed from; the whole batch, on the controller.

    Attributes:
        rewards: float [S], the trajectory's reward on each of its samples.
        columns: Packed columns [N] by name (``versions``, ``logprobs``, ``values`` …), rolled.
        ops: Reductions; ``ops.mask`` is the loss mask.
        parts: float [S] each: the reward's named parts before weighting, on each of the trajectory's samples.
        weights: Weight of each part in the reward.
        token_rewards: float [N], what each trained row earns by itself (a KL penalty); None where nothing is configured.
        owners: int64 [N], the row that trains what a row predicts where branches share a prefix; None where nothing is shared.
        counted: ``ops`` in which a row that branches share counts once; None where nothing is shared.
    """

    rewards: Tensor
    columns: Mapping[str, Tensor]
    ops: SegmentOps
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    token_rewards: Tensor | None = None
    owners: Tensor | None = None
    counted: SegmentOps | None = None

    @property
    def once(self) -> SegmentOps:
        """Reductions for statistics over rows and their numbers: a row that branches share counts once."""
        return self.ops if self.counted is None else self.counted

    def over_branches(self, x: Tensor) -> Tensor:
        """[N] → [N]: on rows that branches share, the mean over the branches; that is what they are trained with."""
        if self.owners is None:
            return x
        total, count = x.new_zeros(len(x)).index_add(0, self.owners, x), self.owners.bincount(minlength=len(x))
        return (total / count.clamp(min=1))[self.owners]


class Advantage(Protocol):
    """Advantages of a whole batch."""

    def __call__(self, inputs: AdvantageInputs) -> Tensor | dict[str, Tensor]:
        """[N] advantages, or several columns by name (``advantages``, ``returns``)."""
        ...


@dataclass(frozen=True)
class LossInputs:
    """What a loss term is computed from; one micro-batch, on the trainer.

    Attributes:
        outputs: float [N] each, differentiable, of the model that learns under its current weights. A language model gives
            ``logprobs`` (of the predicted tokens) and ``entropy`` (of the distributions they come from), 0 on rows outside the
            mask; a critic or reward model gives ``values`` on every row.
        columns: Packed columns [N] by name (``old_logprobs``, ``advantages`` …), rolled; ``logprobs`` there are the rollout's.
        ops: Reductions; ``ops.mask`` is the loss mask.
    """

    outputs: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    ops: SegmentOps

    @property
    def logprobs(self) -> Tensor:
        """float [N], log-probability of each predicted token under the current weights."""
        return self.outputs["logprobs"]

    @property
    def entropy(self) -> Tensor:
        """float [N], entropy of the distribution that each predicted token comes from, in nats."""
        return self.outputs["entropy"]

    @property
    def values(self) -> Tensor:
        """float [N], what the scalar head says at each row; row p has read the tokens up to and including p."""
        return self.outputs["values"]

    def weighted(self, policy_loss: Tensor) -> Tensor:
        """A policy-gradient term [N] times the weights that corrections gave its rows, if there are any."""
        weights = self.columns.get("correction_weights")
        return policy_loss if weights is None else weights.to(policy_loss.dtype) * policy_loss


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
        """Loss of each row. Whatever stands on rows outside the mask (NaN too) must not reach value or gradient."""
        ...


@dataclass(frozen=True)
class LossTerm:
    """A loss as a trainer gets it: the built function, its coefficient in the sum of terms, what it is a function of, and whether it
    vanishes, gradient and all, for a sample whose advantages do."""

    function: Loss
    coefficient: float = 1.0
    unit: Unit = "token"
    proportional_to_advantage: bool = False


class Kl(Protocol):
    """An estimate of KL(policy ‖ reference) from the log-probabilities of sampled tokens."""

    def __call__(self, logprobs: Tensor, reference: Tensor) -> Tensor:
        """float [N] under the policy and under the reference → float [N], nats; differentiable in ``logprobs``."""
        ...


@dataclass(frozen=True)
class CorrectionInputs:
    """What a correction is computed from; the whole batch, on the controller, before its first optimizer step.

    Attributes:
        trainer: float [N], log-probabilities under the trainer's weights before the step (``old_logprobs``).
        rollout: float [N], as the engine sampled them (``logprobs``).
        advantages: float [N].
        ops: Reductions; ``ops.mask`` is the loss mask.
    """

    trainer: Tensor
    rollout: Tensor
    advantages: Tensor
    ops: SegmentOps


@dataclass(frozen=True)
class CorrectionOutputs:
    """What a correction gives.

    Attributes:
        weights: float [N], factors of the policy-gradient terms; a row of weight 0 stays in the denominators. None: all 1.
        keep: bool [N], trained rows that stay; the others leave the batch and its denominators. None: all stay.
        metrics: By name, without prefix.
    """

    weights: Tensor | None = None
    keep: Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Correction(Protocol):
    """Corrects for the distance between what sampled and what is trained. Constant under the gradient."""

    def __call__(self, inputs: CorrectionInputs) -> CorrectionOutputs:
        """Weights, and rows that stay."""
        ...


class Aggregation(Protocol):
    """How rows add up to the loss of an optimizer step."""

    def __call__(self, ops: SegmentOps) -> Tensor:
        """[N] weights; the step's loss is Σ weight · loss over its trained rows."""
        ...
