"""Options of the plug-ins of miles-agents. Environments without options are registered as the plain classes they are."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from miles_core.plugins import PluginConfig


class CalculatorProblems(PluginConfig):
    """Options of ``data_source: calculator_problems``."""

    point: ClassVar[str] = "data_source"
    target: ClassVar[str] = "miles_agents.calculator_problems:CalculatorProblemSource"

    size: int = Field(gt=0)
    """Number of problems."""
    seed: int = 0
    """Another seed, other problems."""
    split: Literal["train", "held_out"] = "train"
    """Disjoint, whatever size and seed."""
    direct: float = Field(0.7, ge=0, le=1)
    """Share of demonstrations that answer at once; the others call the calculator."""
