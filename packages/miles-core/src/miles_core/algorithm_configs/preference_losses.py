"""Options of the losses on pairs of answers, and of the critic's."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..plugins import LossConfig
from ..protocols import Unit


class PairConfig(LossConfig):
    """What every loss on pairs has: a group of two trajectories, one of which is preferred."""

    point: ClassVar[str] = "loss"
    unit: ClassVar[Unit] = "pair"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "advantages"})


class Dpo(PairConfig):
    """Direct preference optimisation."""

    target: ClassVar[str] = "miles_core.algorithms.preference_losses:dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "advantages", "ref_logprobs"})

    beta: float = Field(0.1, gt=0)
    """Strength of the tie to the reference model."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a preference is the wrong way round."""


class Ipo(PairConfig):
    """Identity preference optimisation."""

    target: ClassVar[str] = "miles_core.algorithms.preference_losses:ipo"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "advantages", "ref_logprobs"})

    tau: float = Field(0.1, gt=0)
    """Strength of the tie to the reference model: the margin a token is drawn to 1 / (2·tau)."""


class BradleyTerry(PairConfig):
    """Reward model: the chosen answer should score higher."""

    target: ClassVar[str] = "miles_core.algorithms.preference_losses:bradley_terry"
    head: ClassVar[str] = "scalar"


class ValueClip(LossConfig):
    """The critic's regression on the returns."""

    point: ClassVar[str] = "loss"
    target: ClassVar[str] = "miles_core.algorithms.preference_losses:value_clip"
    head: ClassVar[str] = "scalar"

    clip: float | None = Field(0.2, gt=0)
    """How far a value may move from the one before the step and still gain. None: as far as it likes."""

    def required(self) -> frozenset[str]:
        """The old values only where they bound the new ones."""
        return frozenset({"returns"} | ({"values"} if self.clip is not None else set()))
