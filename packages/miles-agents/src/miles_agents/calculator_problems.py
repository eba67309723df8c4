"""``data_source: calculator_problems``: sums of three two-digit numbers, ``47 + 58 - 12 ?``, made by counter, never stored."""

from __future__ import annotations

import numpy as np

from miles_core.protocols import BuildContext, Passage, Prompt
from miles_core.randomness import generator, key

from .plugins import CalculatorProblems

HELD_OUT = 10
"""One problem in so many is held out."""


class CalculatorProblemSource:
    """Problems, their demonstrations, and a wrong answer given at once as the worse half of a pair.

    Which split a problem belongs to is a hash of its text alone: whatever their sizes and seeds, a train and a held-out source share
    no problem. No partial result is negative.
    """

    def __init__(self, config: CalculatorProblems, context: BuildContext):
        self.config = config

    def __len__(self) -> int:
        return self.config.size

    def __getitem__(self, index: int) -> Prompt:
        """The problem at an index."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} problems")
        random = generator(self.config.seed, "calculator", index)
        while True:
            (a, b, c), (first, second) = random.integers(10, 100, 3).tolist(), random.choice(["+", "-"], 2).tolist()
            partial = a + b if first == "+" else a - b
            total = partial + c if second == "+" else partial - c
            text = f"{a} {first} {b} {second} {c} ?"
            if min(partial, total) >= 0 and split_of(text) == self.config.split:
                break
        calls = [(f"{a} {first} {b}", partial), (f"{partial} {second} {c}", total)]
        return Prompt(
            id=f"{self.config.split}-{index}",
            text=text,
            label=total,
            demonstration=self._demonstration(calls, total, random),
            rejected=(Passage(f" ans {_wrong(total, random)}", trained=True),),
        )

    def _demonstration(self, calls: list[tuple[str, int]], total: int, random: np.random.Generator) -> tuple[Passage, ...]:
        """The answer at once, or by two calls whose results the environment speaks."""
        passages: list[Passage] = []
        if random.random() >= self.config.direct:
            for expression, result in calls:
                passages.append(Passage(f" <call> {expression} </call>", trained=True))
                passages.append(Passage(f" <res> {result} </res>", trained=False, role="environment"))
        return (*passages, Passage(f" ans {total}", trained=True))


def _wrong(total: int, random: np.random.Generator) -> int:
    """What somebody who cannot compute might answer: another number, near."""
    near = total + int(random.integers(1, 20)) * (1 if random.random() < 0.5 else -1)
    return near if near >= 0 else total + 1


def split_of(text: str) -> str:
    """``train`` or ``held_out``."""
    return "held_out" if key("calculator", text) % HELD_OUT == 0 else "train"
