"""Options of the advantages."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..plugins import AdvantageConfig


class Grpo(AdvantageConfig):
    """Group-relative advantage."""

    point: ClassVar[str] = "advantage"
    target: ClassVar[str] = "miles_core.algorithms.advantages:grpo"
    needs: ClassVar[frozenset[str]] = frozenset({"rewards", "groups"})

    scale: Literal["std", "none"] = "std"
    """std: divide by the group's sample standard deviation; none: mean-only (Dr.GRPO)."""
