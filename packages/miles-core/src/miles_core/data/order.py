"""Orders in which an epoch goes through rows that are not equally near, each computed from a position alone.

Rows of a Parquet file are read a row group at a time, rows of a stream one after another. A uniform permutation of them would
read a row group for every row. So blocks of rows are put in a seeded order, neighbours in it form a window that fits in
memory, and rows are permuted within the window. Every row comes once an epoch; where there is one window only, the
permutation is that of every other source: over all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..randomness import generator, shuffled


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order of blocks.

    Attributes:
        blocks: int64 [blocks]: the blocks in this epoch's order.
        ends: int64 [blocks]: rows up to and with each of them.
        windows: int64 [windows + 1]: rows before each window.
    """

    blocks: np.ndarray
    ends: np.ndarray
    windows: np.ndarray


class Blocks:
    """Rows that lie in blocks.

    Attributes:
        sizes: int64 [blocks]: rows of each, in the source's own order.
        window: So many rows are permuted among each other; more if a single block has more.
        movable: Whether blocks can be read in any order; those of a stream cannot.
    """

    def __init__(self, sizes: np.ndarray, window: int, *, movable: bool) -> None:
        self.sizes, self.window, self.movable = np.asarray(sizes, np.int64), window, movable
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._epochs: dict[tuple[str | int, ...], _Epoch] = {}

    def only(self, kept: np.ndarray) -> Blocks:
        """The same blocks with only the rows ``kept`` (int64, ascending), which are counted anew from 0."""
        ends = np.searchsorted(kept, np.cumsum(self.sizes))
        return Blocks(np.diff(ends, prepend=0), self.window, movable=self.movable)

    def index(self, index: int, *parts: str | int) -> int:
        """Row at place ``index`` of the epoch that ``parts`` (seed, epoch) name; a permutation of all rows."""
        epoch = self._epoch(parts)
        window = int(np.searchsorted(epoch.windows, index, "right")) - 1
        first, end = int(epoch.windows[window]), int(epoch.windows[window + 1])
        place = first + shuffled(index - first, end - first, *parts, "window", window)
        at = int(np.searchsorted(epoch.ends, place, "right"))
        block = int(epoch.blocks[at])
        return int(self._starts[block] + place - (epoch.ends[at] - self.sizes[block]))

    def _epoch(self, parts: tuple[str | int, ...]) -> _Epoch:
        """Kept for two epochs: groups in flight straddle their border."""
        if parts not in self._epochs:
            count = len(self.sizes)
            blocks = generator("blocks", *parts).permutation(count) if self.movable else np.arange(count)
            ends = np.cumsum(self.sizes[blocks])
            self._epochs[parts] = _Epoch(blocks, ends, _windows(ends, self.window))
            while len(self._epochs) > 2:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[parts]


def _windows(ends: np.ndarray, window: int) -> np.ndarray:
    """Rows before each window, and all rows: as many whole blocks as fit, at least one."""
    borders = [0]
    while borders[-1] < ends[-1]:
        fitting = int(np.searchsorted(ends, borders[-1] + window, "right"))
        first = int(np.searchsorted(ends, borders[-1], "right"))
        borders.append(int(ends[max(fitting - 1, first)]))
    return np.array(borders, np.int64)
