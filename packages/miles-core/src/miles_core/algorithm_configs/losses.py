"""Options of the loss terms."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from ..plugins import LossConfig

Old = Literal["recompute", "rollout", "current"]
"""Whose log-probabilities the ratio divides by. recompute: the trainer's before the first optimizer step; rollout: as sampled;
current: the present ones, detached (right only for one optimizer step a batch, and cheapest)."""


class PolicyGradientConfig(LossConfig):
    """What every loss with a ratio π / π_old has."""

    point: ClassVar[str] = "loss"

    old: Old = "recompute"
    """Whose log-probabilities the ratio divides by (``Old``)."""

    def required(self) -> frozenset[str]:
        """Depends on ``old``."""
        return self.needs | frozenset({"advantages", "logprobs"} | ({"old_logprobs"} if self.old == "recompute" else set()))

    def problems(self, stage: Any) -> list[str]:
        """``old: current`` is wrong from the second optimizer step of a batch on."""
        if self.old == "current" and stage.epochs * stage.minibatches > 1:
            return ["old: current is right for one optimizer step a batch only; use recompute, or epochs: 1 and minibatches: 1"]
        return []


class PpoClip(PolicyGradientConfig):
    """Clipped policy-gradient loss."""

    target: ClassVar[str] = "miles_core.algorithms.losses:ppo_clip"

    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""


class Nll(LossConfig):
    """Negative log-likelihood of the trained tokens (SFT)."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.losses:nll"
