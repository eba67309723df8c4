"""Who computes what: an optimizer step, or a batch that is annotated, cut into micro-batches for every rank, and results put together.

Data-parallel ranks get whole units. All of them get the same number of micro-batches: with experts spread over them, every forward pass
is a collective. A rank without enough micro-batches gets dummies: one row, nothing trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from miles_core.batch import Batch, Segments
from miles_core.columns import Column, column_spec, empty_column
from miles_core.plan import balanced_shards, micro_batches
from miles_core.refs import SampleRef

from .layout import Layout
from .messages import Elsewhere, Micro


@dataclass(frozen=True)
class Cut:
    """A batch in micro-batches.

    Attributes:
        batch: The batch.
        layout: Over how many ranks.
        samples: By data-parallel rank the sample indices of each micro-batch, None for dummies; equally many everywhere.
    """

    batch: Batch
    layout: Layout
    samples: list[list[np.ndarray | None]]

    @staticmethod
    def of(batch: Batch, layout: Layout, units: np.ndarray, max_tokens: int) -> Cut:
        """Shards of nearly equal numbers of rows, each in micro-batches of at most ``max_tokens`` rows (a longer unit stands alone).

        Args:
            batch: At least one sample.
            layout: Sizes.
            units: int64 [S], samples with the same number stay together.
            max_tokens: Rows of a micro-batch; context-parallel ranks share them.
        """
        parts: list[list[np.ndarray | None]] = []
        for shard in balanced_shards(batch.lengths, units, layout.data):
            own = micro_batches(batch.lengths[shard], units[shard], max_tokens)
            parts.append([shard[p] for p in own])
        most = max(len(p) for p in parts)
        return Cut(batch, layout, [p + [None] * (most - len(p)) for p in parts])

    @staticmethod
    def alone(batch: Batch, layout: Layout, samples: np.ndarray) -> Cut:
        """One micro-batch of these samples on the first data-parallel rank; the others get a dummy."""
        return Cut(batch, layout, [[samples], *([None] for _ in range(layout.data - 1))])

    def for_ranks(self, reads: Sequence[str], last: Sequence[str]) -> list[tuple[list[Micro]]]:
        """Arguments of every rank: its micro-batches with the columns ``reads``, on the last pipeline stage also ``last``."""
        made: dict[tuple[int, bool], list[Micro]] = {}
        arguments = []
        for rank in range(self.layout.world_size):
            at = self.layout.coordinates(rank)
            key = (at.data, at.pipeline == self.layout.pipeline - 1)
            if key not in made:
                names = [*reads, *(n for n in last if key[1] and n not in reads)]
                made[key] = [self._micro(samples, names) for samples in self.samples[at.data]]
            arguments.append((made[key],))
        return arguments

    def gather(self, results: Sequence[list[np.ndarray | None] | None]) -> np.ndarray:
        """float32 [N] over the batch's rows; NaN where no rank said anything.

        Args:
            results: By rank, None from those that have none to give; else for each micro-batch a value for each row that the rank held.
        """
        column = np.full(self.batch.n_rows, np.nan, np.float32)
        for rank, parts in enumerate(results):
            if parts is None:
                continue
            at = self.layout.coordinates(rank)
            for samples, values in zip(self.samples[at.data], parts, strict=True):
                if samples is None or values is None:
                    continue
                rows = self.batch.rows_of(samples)
                if self.layout.context > 1:
                    rows = rows[self._bare(samples).context_rows(at.context, self.layout.context)]
                column[rows] = values
        return column

    def _micro(self, samples: np.ndarray | None, names: Sequence[str]) -> Micro:
        columns = {n: self.batch.columns[n] for n in names}
        if samples is None:
            return Micro(_dummy(self.batch.refs[0], columns), False)
        micro = replace(self.batch, columns=columns).select(samples)
        return Micro(replace(micro, refs=tuple(replace(r, handle=Elsewhere()) for r in micro.refs)), True)

    def _bare(self, samples: np.ndarray) -> Batch:
        return replace(self.batch, columns={}).select(samples)


def _dummy(ref: SampleRef, columns: dict[str, Any]) -> Batch:
    """A sample of one token that is not trained."""
    filled: dict[str, Column] = {name: empty_column(column_spec(name), 1, like) for name, like in columns.items()}
    one = np.zeros(1, np.int64)
    segments = Segments.of(one, one, np.zeros(1, np.int64))
    return Batch((replace(ref, length=1, handle=Elsewhere()),), np.array([0, 1]), filled, segments)
