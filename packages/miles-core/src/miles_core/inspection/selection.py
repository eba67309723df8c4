"""Which trajectories are meant: ``--step 5``, ``--reward 0..0.5``, ``--prompt TEXT``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigError
from .facts import Facts


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        """What ``parse`` reads: ``0..0.5``, ``..0``."""
        return "..".join("" if math.isinf(end) else repr(end) for end in (self.low, self.high))

    @staticmethod
    def parse(text: str | None, option: str) -> Range | None:
        """``3`` · ``0..0.5`` · ``..0`` · ``1..``; None stays None. Raises ConfigError naming the option."""
        if text is None:
            return None
        first, dots, last = text.partition("..")
        try:
            low = float(first) if first else -math.inf
            high = float(last) if last else math.inf
        except ValueError:
            low = high = math.nan
        if not text.strip(".") or not low <= (high if dots else low):
            raise ConfigError(f"{option} {text!r}: expected a number, or a range such as 0..0.5, ..0 or 1..")
        return Range(low, high if dots else low)


@dataclass(frozen=True)
class Selection:
    """What is asked for; everything by default.

    Attributes:
        steps: Of the run.
        rewards: Trajectories without a reward lie in no range.
        prompt: A prompt's id, or a part of its text, whatever the case.
    """

    steps: Range | None = None
    rewards: Range | None = None
    prompt: str | None = None

    def holds(self, facts: Facts) -> bool:
        """Whether a trajectory is meant. Its step is looked at by file, before."""
        if self.rewards is not None and (facts.reward is None or facts.reward not in self.rewards):
            return False
        return self.prompt is None or self.prompt == facts.prompt_id or self.prompt.casefold() in facts.prompt.casefold()
