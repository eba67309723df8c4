"""Where a run is in its data: a position. Epoch and row follow from it, so a cut stores one number and resume is exact."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import DataError
from .protocols import DataSource, Ordered, Prompt
from .randomness import shuffled


@dataclass
class Cursor:
    """Goes through a data source epoch after epoch, each in a seeded order of its own.

    Attributes:
        source: The prompts.
        seed: The run's seed.
        shuffle: Whether epochs are shuffled.
    """

    source: DataSource
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if len(self.source) == 0:
            raise DataError("the data source is empty: no prompt to train on")

    def place(self, position: int) -> tuple[int, int]:
        """Epoch, and index in the source, of ``position``."""
        if isinstance(self.source, Ordered):
            return self.source.place(position, self.seed, self.shuffle)
        epoch, index = divmod(position, len(self.source))
        return epoch, shuffled(index, len(self.source), self.seed, "epoch", epoch) if self.shuffle else index

    def epoch(self, position: int) -> int:
        """How often the source (of a mixture: the part that is drawn from) was gone through before ``position``."""
        return self.place(position)[0]

    def prompt(self, position: int) -> Prompt:
        """The prompt at ``position``."""
        return self.source[self.place(position)[1]]
