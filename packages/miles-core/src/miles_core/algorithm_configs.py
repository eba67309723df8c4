"""Options of the built-in algorithms, torch-free; each names the function in ``miles_core.algorithms`` that it is for.

A new algorithm is one function there, one class here and one entry point; or, outside this package, one function named as
``module:attribute`` whose keyword-only arguments are its options.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from .plugins import PluginConfig


class Grpo(PluginConfig):
    """Group-relative advantage."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.advantages:grpo"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "groups"})
    gives: ClassVar[frozenset[str]] = frozenset({"advantages"})

    scale: Literal["std", "none"] = "std"
    """std: divide by the group's sample standard deviation; none: mean-only (Dr.GRPO)."""


class PpoClip(PluginConfig):
    """Clipped policy-gradient loss."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.losses:ppo_clip"

    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 − clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped above at 1 + clip_high."""
    old: Literal["recompute", "rollout", "current"] = "recompute"
    """Log-probabilities under the old policy. recompute: by the trainer before the first optimizer step; rollout: as sampled;
    current: the present ones, detached (right only for one optimizer step a batch, and cheapest)."""

    def required(self) -> frozenset[str]:
        """Depends on ``old``."""
        return frozenset({"advantages", "logprobs"} | ({"old_logprobs"} if self.old == "recompute" else set()))

    def problems(self, stage: Any) -> list[str]:
        """``old: current`` is wrong from the second optimizer step of a batch on."""
        if self.old == "current" and stage.epochs * stage.minibatches > 1:
            return ["old: current is right for one optimizer step a batch only; use recompute, or epochs: 1 and minibatches: 1"]
        return []


class Nll(PluginConfig):
    """Negative log-likelihood of the trained tokens (SFT)."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.losses:nll"


class TokenMean(PluginConfig):
    """Every trained token of the optimizer step weighs the same."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:token_mean"
