"""Options of the advantages."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from ..plugins import AdvantageConfig, plug


class Grpo(AdvantageConfig):
    """Group-relative advantage."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.advantages:grpo"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "groups"})

    scale: Literal["std", "none"] = "std"
    """std: divide by the group's sample standard deviation; none: mean-only (Dr.GRPO)."""


class Rloo(AdvantageConfig):
    """Reward less the mean of the group's other trajectories."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.advantages:rloo"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "groups"})


class ReinforcePp(AdvantageConfig):
    """Returns, whitened over all trained tokens of the batch."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.gae:reinforce_pp"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards"})
    per_token: ClassVar[bool] = True

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount a token."""


class ReinforcePpBaseline(ReinforcePp):
    """The same, of rewards less their group's mean."""

    target: ClassVar[str] = "miles_core.algorithms.gae:reinforce_pp_baseline"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "groups"})


class Gae(AdvantageConfig):
    """Generalized advantage estimation with a critic; also gives the critic's ``returns``."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.gae:gae"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "values"})
    gives: ClassVar[frozenset[str]] = frozenset({"advantages", "returns"})
    per_token: ClassVar[bool] = True

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount a trained token."""
    lam: float = Field(1.0, ge=0, le=1)
    """λ: 0 trusts the critic for everything after the next token, 1 only the reward."""
    whiten: bool = True
    """Whether the advantages of all trained tokens of the batch are made mean 0, variance 1."""


class _OfPlainRewards(AdvantageConfig):
    """For rewards that a KL penalty would turn into something else."""

    point: ClassVar[str] = "advantage"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "groups"})
    rewards_are: ClassVar[str]

    def problems(self, stage: Any) -> list[str]:
        """No KL penalty in the reward."""
        own = [m for m in stage.models.values() if m.advantage is not None and any(a is self for a in m.advantage.nested())]
        if any(m.kl_reward for m in own):
            return [f"{self.rewards_are}, which kl_reward would change; put a kl term into the losses instead"]
        return []


class MaxRl(_OfPlainRewards):
    """Reward less its group's mean, divided by that mean."""

    target: ClassVar[str] = "miles_core.algorithms.advantages:maxrl"
    rewards_are: ClassVar[str] = "it takes rewards of 0 and 1"


class Opo(AdvantageConfig):
    """Reward less its group's mean by length."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.advantages:opo"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "groups"})


class PassAtK(_OfPlainRewards):
    """What a trajectory adds to the chance that one of k is right."""

    target: ClassVar[str] = "miles_core.algorithms.advantages:pass_at_k"
    rewards_are: ClassVar[str] = "it takes rewards of 0 and 1"

    k: int = Field(gt=0)
    """Of how many trajectories one has to be right; at most the rollout's group_size."""

    def problems(self, stage: Any) -> list[str]:
        """Groups are of at least k."""
        size = getattr(stage.rollout, "group_size", None)
        small = [f"k is {self.k}, but groups have {size} trajectories; lower k or raise the rollout's group_size"]
        return super().problems(stage) + (small if size is not None and size < self.k else [])


class Gdpo(_OfPlainRewards):
    """Each part of the reward normalised for itself, then their weighted sum over the batch."""

    target: ClassVar[str] = "miles_core.algorithms.advantages:gdpo"
    rewards_are: ClassVar[str] = "it normalises each named part of the reward"


class Opd(AdvantageConfig):
    """On-policy distillation: another advantage, or none, less the log-ratio of student and teacher."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.advantages:opd"
    needs: ClassVar[frozenset[str]] = frozenset({"logprobs", "teacher_logprobs"})
    per_token: ClassVar[bool] = True

    base: plug("advantage") | None = None  # ty: ignore
    """The advantage that distillation is added to; none: distillation alone, without rewards."""
    coefficient: float = Field(1.0, gt=0)
    """λ: weight of the log-ratio."""

    def required(self) -> frozenset[str]:
        """What the base needs, too."""
        return self.needs | (self.base.required() if self.base else frozenset())

    def provided(self) -> frozenset[str]:
        """What the base gives, too."""
        return self.gives | (self.base.provided() if self.base else frozenset())


class Preference(AdvantageConfig):
    """+1 for the group's best trajectory, −1 for its worst: what pair losses read."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.advantages:preference"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "pairs"})
