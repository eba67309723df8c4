"""``environment: gsm8k_calculator``: computes GSM8K's annotations while the policy writes its solution.

The policy writes ``48/2 = <<48/2=``, the environment injects ``24>>``, the policy goes on. It gives no reward: ``reward: math`` scores
the last line, ``#### 72``.
"""

from __future__ import annotations

import re

from miles_core.protocols import Observation, Prompt

from .arithmetic import evaluate, written

OPEN = re.compile(r"<<([^<>=\n]+)=$")
ANSWER_LINE = re.compile(r"^#### *-?[\d,.]*\d", re.MULTILINE)


class Gsm8kCalculator:
    """Pauses the policy at every ``=``; where that closes an open ``<<`` around arithmetic it injects the result, elsewhere nothing."""

    stop = ("=",)

    async def reset(self, prompt: Prompt) -> Observation:
        """The question."""
        return Observation(prompt.text, stop=self.stop)

    async def step(self, action: str) -> Observation:
        """``value>>`` after ``<<expression=``; done once the line ``#### number`` was written."""
        return Observation(_result(action), done=ANSWER_LINE.search(action) is not None, stop=self.stop)


def _result(action: str) -> str:
    """What the policy wrote is not always arithmetic: then it is left to finish the annotation itself."""
    annotation = OPEN.search(action)
    try:
        return f"{written(evaluate(annotation[1]))}>>" if annotation else ""
    except ValueError:
        return ""
