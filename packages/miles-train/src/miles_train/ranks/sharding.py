"""Who computes what: an optimizer step, or a batch that is annotated, cut into micro-batches for every rank, and results put together.

Data-parallel ranks get whole units. All of them get the same number of micro-batches: with experts spread over them, every forward pass
is a collective. A rank without enough micro-batches gets dummies: one row, nothing trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from miles_core.batch import Batch, Segments
from miles_core.columns import Column, column_spec, empty_column
from miles_core.plan import balanced_shards, micro_batches

from .layout import Layout
from .messages import Elsewhere, Micro

UNEVEN = 1.05
"""How many times its share a rank may get so that groups stay together."""


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
    def whole(batch: Batch, layout: Layout, units: np.ndarray) -> Cut:
        """A shard for each rank, of nearly equal numbers of rows; ranks make micro-batches of it themselves.

        Groups stay together where that is as well: what their samples begin with is then computed on one rank only.
        """
        groups = balanced_shards(batch.lengths, batch.segments.group, layout.data)
        most = max(int(batch.lengths[shard].sum()) for shard in groups)
        shards = groups if most * layout.data <= UNEVEN * batch.n_rows else balanced_shards(batch.lengths, units, layout.data)
        return Cut(batch, layout, [[shard if len(shard) else None] for shard in shards])

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
            return Micro(empty_batch(replace(self.batch, columns=columns)), False)
        micro = replace(self.batch, columns=columns).select(samples)
        return Micro(replace(micro, refs=tuple(replace(r, handle=Elsewhere()) for r in micro.refs)), True)

    def _bare(self, samples: np.ndarray) -> Batch:
        return replace(self.batch, columns={}).select(samples)


def empty_batch(like: Batch) -> Batch:
    """A sample of one token that is not trained, with the columns of another batch."""
    filled: dict[str, Column] = {name: empty_column(column_spec(name), 1, column) for name, column in like.columns.items()}
    one = np.zeros(1, np.int64)
    segments = Segments.of(one, one, np.zeros(1, np.int64))
    return Batch((replace(like.refs[0], length=1, handle=Elsewhere()),), np.array([0, 1]), filled, segments)
