"""Options of the loss terms of a language model; what they compute is told in ``miles_core.algorithms``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ..plugins import LossConfig, plug
from ..protocols import Unit

if TYPE_CHECKING:
    import numpy as np

    from ..batch import Batch

Old = Literal["recompute", "rollout", "current"]
"""Whose log-probabilities the ratio divides by. recompute: the trainer's before the first optimizer step; rollout: as sampled;
current: the present ones, detached (right only for one optimizer step a batch, and cheapest)."""


class PolicyGradientConfig(LossConfig):
    """What every loss with a ratio π / π_old has."""

    point: ClassVar[str] = "loss"
    proportional_to_advantage: ClassVar[bool] = True

    old: Old = "recompute"
    """Whose log-probabilities the ratio divides by (``Old``)."""

    def required(self) -> frozenset[str]:
        """Depends on ``old``."""
        return self.needs | frozenset({"advantages", "logprobs"} | ({"old_logprobs"} if self.old == "recompute" else set()))

    def required_before(self) -> frozenset[str]:
        """All but what the ratio divides by."""
        return self.required() - {"old_logprobs"}

    def problems(self, stage: Any) -> list[str]:
        """``old: current`` is wrong from the second optimizer step of a batch on."""
        if self.old == "current" and stage.epochs * stage.minibatches > 1:
            return ["old: current is right for one optimizer step a batch only; use recompute, or epochs: 1 and minibatches: 1"]
        return []


def _varying_advantages(loss: LossConfig, stage: Any) -> list[str]:
    """Names of the token-varying advantages of the models that this loss trains."""
    advantages = [model.advantage for model in stage.models.values() if loss in model.losses.values() and model.advantage is not None]
    return [advantage.use for advantage in advantages if advantage.varies()]


class PpoClip(PolicyGradientConfig):
    """Clipped policy-gradient loss."""

    target: ClassVar[str] = "miles_core.algorithms.losses:ppo_clip"

    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """Where the advantage is negative, the loss is at most this times |A|. None: no such bound."""


class Gspo(PolicyGradientConfig):
    """One length-normalised ratio for each sequence, clipped."""

    target: ClassVar[str] = "miles_core.algorithms.trust_region:gspo"
    unit: ClassVar[Unit] = "sequence"

    clip_low: float = Field(3e-4, gt=0, lt=1)
    """The sequence's ratio is clipped below at 1 − clip_low."""
    clip_high: float = Field(4e-4, gt=0)
    """The sequence's ratio is clipped above at 1 + clip_high."""
    token_advantages: bool = False
    """GSPO-token: the gradient of each row stays with its token, so that advantages may differ between tokens."""

    def problems(self, stage: Any) -> list[str]:
        """A sequence's ratio wants one advantage, unless each row keeps its gradient."""
        varying = [] if self.token_advantages else _varying_advantages(self, stage)
        fix = "set token_advantages: true, or use an advantage that is one number a sequence"
        return super().problems(stage) + [
            f"its ratio is a whole sequence's, but advantage {a!r} differs between tokens; {fix}" for a in varying
        ]


class Cispo(PolicyGradientConfig):
    """REINFORCE with a bounded importance weight."""

    target: ClassVar[str] = "miles_core.algorithms.losses:cispo"

    clip_low: float = Field(0.2, gt=0, le=1)
    """The weight is at least 1 − clip_low; 1: no lower bound."""
    clip_high: float = Field(0.28, gt=0)
    """The weight is at most 1 + clip_high."""


class Sapo(PolicyGradientConfig):
    """A smooth gate in place of the clip."""

    target: ClassVar[str] = "miles_core.algorithms.losses:sapo"

    tau_positive: float = Field(1.0, gt=0)
    """How fast the gate closes where the advantage is positive."""
    tau_negative: float = Field(1.05, gt=0)
    """How fast it closes elsewhere."""


class Dppo(PolicyGradientConfig):
    """Masks tokens by how far their distribution moved."""

    target: ClassVar[str] = "miles_core.algorithms.trust_region:dppo"

    divergence: Literal["tv", "kl"] = "tv"
    """Between old and new probability of the token against all others: total variation, or KL(old ‖ new)."""
    threshold: float | None = Field(None, gt=0)
    """Divergence beyond which a token that moves on outward is masked. None: 0.15 for tv, 0.05 for kl."""


class Gmpo(PolicyGradientConfig):
    """Geometric mean of a sequence's ratios, each clipped."""

    target: ClassVar[str] = "miles_core.algorithms.trust_region:gmpo"
    unit: ClassVar[Unit] = "sequence"

    clip_low: float = Field(0.4, gt=0)
    """A token's LOG-ratio is clipped below at −clip_low where the advantage is negative."""
    clip_high: float = Field(0.4, gt=0)
    """A token's LOG-ratio is clipped above at clip_high where the advantage is positive."""

    def problems(self, stage: Any) -> list[str]:
        """A sequence's ratio wants one advantage."""
        fix = "use one that is one number a sequence, or another loss"
        varying = _varying_advantages(self, stage)
        return super().problems(stage) + [
            f"its ratio is a whole sequence's, but advantage {a!r} differs between tokens; {fix}" for a in varying
        ]


class Dro(PolicyGradientConfig):
    """Policy gradient with a quadratic penalty on the log-ratio."""

    target: ClassVar[str] = "miles_core.algorithms.losses:dro"
    proportional_to_advantage: ClassVar[bool] = False  # the penalty is not

    beta: float = Field(0.05, gt=0)
    """Strength of the penalty."""


class CovarianceConfig(PolicyGradientConfig):
    """What losses have that spare tokens of high covariance between log-probability and advantage."""

    selection: ClassVar[frozenset[str]] = frozenset({"fraction"})
    """Options of the selection, which is done before the loss."""

    fraction: float = Field(2e-4, gt=0, le=1)
    """How many of the batch's trained tokens are selected (at least one)."""

    def required_before(self) -> frozenset[str]:
        """The selection is made by the old log-probabilities."""
        return self.required()

    def options(self) -> dict[str, Any]:
        """The loss's own, without those of the selection."""
        return {name: value for name, value in super().options().items() if name not in self.selection}

    def problems(self, stage: Any) -> list[str]:
        """The selection needs log-probabilities from before the step."""
        early = ["old: current leaves nothing to select tokens by before the step; use recompute or rollout"]
        return (early if self.old == "current" else []) + super().problems(stage)


class ClipCov(CovarianceConfig):
    """Leaves out a few tokens of high covariance."""

    target: ClassVar[str] = "miles_core.algorithms.covariance:clip_cov"
    selection: ClassVar[frozenset[str]] = frozenset({"fraction", "low", "high"})

    low: float = 1.0
    """Tokens are drawn among those whose covariance is above this."""
    high: float = 5.0
    """Tokens are drawn among those whose covariance is below this."""
    clip_low: float = Field(1.0, gt=0, le=1)
    """The ratio is clipped below at 1 − clip_low; 1: not at all."""
    clip_high: float = Field(1.0, gt=0)
    """The ratio is clipped above at 1 + clip_high."""

    def columns_from(self, batch: Batch, seed: int) -> dict[str, np.ndarray]:
        """``high_covariance``, bool [N]."""
        from ..algorithms.covariance import drawn_between

        return {"high_covariance": drawn_between(batch, seed, fraction=self.fraction, low=self.low, high=self.high, old=self.old)}


class KlCov(CovarianceConfig):
    """Penalises the drift of the tokens with the highest covariances."""

    target: ClassVar[str] = "miles_core.algorithms.covariance:kl_cov"
    proportional_to_advantage: ClassVar[bool] = False  # the penalty is not

    fraction: float = Field(2e-3, gt=0, le=1)
    """How many of the batch's trained tokens are selected (at least one)."""
    penalty: float = Field(1.0, gt=0)
    """Factor of their |log-ratio| in the loss."""

    def columns_from(self, batch: Batch, seed: int) -> dict[str, np.ndarray]:
        """``high_covariance``, bool [N]."""
        from ..algorithms.covariance import highest

        return {"high_covariance": highest(batch, seed, fraction=self.fraction, old=self.old)}


class Reinforce(LossConfig):
    """Plain policy gradient, without ratio."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.losses:reinforce"
    proportional_to_advantage: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"advantages"})


class OpdLoss(LossConfig):
    """On-policy distillation: policy gradient of the reverse KL to a teacher."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.losses:opd"
    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logprobs"})


class Nll(LossConfig):
    """Negative log-likelihood of the trained tokens (SFT)."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.losses:nll"


class Entropy(LossConfig):
    """Negative entropy: with a positive coefficient (0.001, say) a bonus on entropy."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.losses:entropy"


class KlLoss(LossConfig):
    """Divergence from the reference model."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.losses:kl_loss"

    estimator: plug("kl") = Field(default={"use": "k3"}, validate_default=True)  # ty: ignore
    """How it is estimated from the sampled tokens."""
    unbiased: bool = False
    """Multiply the estimate by π / π_old (DeepSeek-V3.2): for k1 and k3 its gradient is then the divergence's."""

    def required(self) -> frozenset[str]:
        """Depends on ``unbiased``."""
        return frozenset({"ref_logprobs"} | ({"old_logprobs"} if self.unbiased else set()))

    def required_before(self) -> frozenset[str]:
        """All but what the ratio divides by."""
        return frozenset({"ref_logprobs"})

    def problems(self, stage: Any) -> list[str]:
        """The ratio mends only estimators whose mean is the divergence."""
        if self.unbiased and self.estimator.use in ("k2", "abs"):
            return [
                f"unbiased: true is right for k1 and k3; the mean of {self.estimator.use} is not the divergence. Use k3, or unbiased: false"
            ]
        return []
