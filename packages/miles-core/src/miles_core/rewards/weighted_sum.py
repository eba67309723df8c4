"""``reward: weighted_sum``: a reward made of named parts, each a reward with a weight of its own."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from ..plugins import RewardConfig, plug

PartName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class WeightedSum(RewardConfig):
    """Options of ``reward: weighted_sum``. The ``Scorer`` adds it up; it calls the parts like any other reward, all at once, each with
    its own unit and deadline. Part ``p`` of reward ``r`` is ``r/p`` among the sample's named parts and in the metrics.
    """

    point: ClassVar[str] = "reward"

    parts: dict[PartName, plug("reward")] = Field(min_length=1)  # ty: ignore
    """By name; the reward is Σ weight · part. A part may be a ``weighted_sum``."""

    @model_validator(mode="after")
    def _time_is_the_parts(self) -> Self:
        if self.timeout_s != type(self).model_fields["timeout_s"].default:
            raise ValueError("timeout_s of a weighted_sum would have no effect; give it to its parts")
        return self
