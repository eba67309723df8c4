"""Packed rows → what a Hugging Face model takes, and where each row's hidden state is found afterwards.

Three layouts of the same samples::

    padded   [S, longest]: every sample is a row of its own, padded on the right
    packed   [1, N]: all rows end to end, without padding
    shared   [1, n ≤ N]: what several samples begin with (a group's prompt, and the answers as far as they agree) stands once

In the last two, samples are put side by side for attention only (``attention``), in blocks of similar length. Numbers do not depend on the
layout beyond rounding. Which one is taken is a matter of cost (``planning``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from miles_core.batch import Batch

from ..ranks.sharding import empty_batch

Name = Literal["padded", "packed", "shared"]


@dataclass(frozen=True)
class Layout:
    """Arrays of a forward pass.

    Attributes:
        tokens: int64 [B, T].
        where: int64 [N], index of each packed row in the flattened [B · T] hidden states.
        positions: int64 [B, T]; None: 0 to T − 1.
        blocks, places: See ``attention.Blocks``; no blocks where each of the B is one sample.
    """

    tokens: np.ndarray
    where: np.ndarray
    positions: np.ndarray | None = None
    blocks: tuple[np.ndarray, ...] = ()
    places: np.ndarray | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together.

    Attributes:
        samples: int64, their indices in the batch that they are a part of; none if nobody wants the numbers (a rank that only takes part).
        batch: They themselves.
        layout: Their rows as the model takes them.
    """

    samples: np.ndarray
    batch: Batch
    layout: Layout

    @staticmethod
    def of(whole: Batch, samples: np.ndarray, name: Name) -> MicroBatch:
        """Some samples of a batch in a layout."""
        batch = whole.select(samples)
        return MicroBatch(samples, batch, lay_out(batch, name))

    @staticmethod
    def without_samples(like: Batch) -> MicroBatch:
        """A row that nobody asks for, with columns like those of a batch."""
        batch = empty_batch(like)
        return MicroBatch(np.zeros(0, np.int64), batch, lay_out(batch, "padded"))


def lay_out(batch: Batch, name: Name) -> Layout:
    """The arrays of a layout. Needs ``tokens`` and ``positions``; with ``routing``, rows with other experts are other rows."""
    tokens, positions = batch.array("tokens").astype(np.int64), batch.array("positions").astype(np.int64)
    if name == "padded":
        longest = int(batch.lengths.max())
        where = batch.segment * longest + positions
        padded = np.zeros((len(batch), longest), np.int64)
        padded.flat[where] = tokens
        return Layout(padded, where)
    where = _once(batch) if name == "shared" else np.arange(batch.n_rows)
    first = np.zeros(int(where.max()) + 1, np.int64)
    first[where[::-1]] = np.arange(batch.n_rows)[::-1]  # the packed row that each row of the pass is taken from
    widths, blocks, offset = block_widths(batch.lengths), [], 0
    places = np.zeros(batch.n_rows, np.int64)
    for width in np.unique(widths):
        samples = np.flatnonzero(widths == width)
        rows = batch.rows_of(samples)
        at = np.repeat(np.arange(len(samples)) * width, batch.lengths[samples]) + positions[rows]
        block = np.zeros((len(samples), width), np.int64)
        block.flat[at] = where[rows]
        places[rows] = offset + at
        blocks.append(block)
        offset += block.size
    return Layout(tokens[first][None], where, positions[first][None], tuple(blocks), places[first])


def block_widths(lengths: np.ndarray) -> np.ndarray:
    """int64 [S]: in attention each sample is padded to this many rows: 16, 32, 48, 64, 96, 128, 192, 256 … (sdpa likes multiples of 16)."""
    octave = 32 * 2 ** np.ceil(np.log2(np.maximum(lengths, 32) / 32)).astype(np.int64)
    narrow = np.where(octave == 32, 16, octave // 4 * 3)
    return np.where(lengths <= narrow, narrow, octave)


def shared_with_previous(batch: Batch, order: np.ndarray) -> np.ndarray:
    """int64 [S]: how many rows sample ``order[i]`` begins with that ``order[i − 1]`` begins with too; 0 for the first."""
    shared = np.zeros(len(order), np.int64)
    most = np.minimum(batch.lengths[order[1:]], batch.lengths[order[:-1]])  # [S − 1], rows of each pair that may be alike
    pair = np.repeat(np.arange(len(most)), most)
    offset = np.arange(len(pair)) - np.repeat(np.cumsum(most) - most, most)
    keys, starts = _keys(batch), batch.cu_seqlens[order]
    differ = np.flatnonzero(keys[starts[pair] + offset] != keys[starts[pair + 1] + offset])
    shared[1:] = most
    np.minimum.at(shared, pair[differ] + 1, offset[differ])
    return shared


def by_beginning(batch: Batch) -> np.ndarray:
    """int64 [S]: samples in an order in which those that begin alike are neighbours."""
    keys, bounds = _keys(batch), batch.cu_seqlens
    return np.array(sorted(range(len(batch)), key=lambda s: keys[bounds[s] : bounds[s + 1]].tobytes()), np.int64)


def _keys(batch: Batch) -> np.ndarray:
    """[N] of some dtype that compares whole: what a row's hidden state is a function of, beside the rows before it."""
    tokens = batch.array("tokens").astype(np.int32)
    if "routing" not in batch.columns:
        return tokens
    experts = np.ascontiguousarray(batch.array("routing").reshape(batch.n_rows, -1)).view(np.uint8)
    rows = np.ascontiguousarray(np.concatenate([tokens[:, None].view(np.uint8), experts], axis=1))
    return rows.view(np.dtype((np.void, rows.shape[1])))[:, 0]


def _once(batch: Batch) -> np.ndarray:
    """int64 [N]: the number of each row where rows that have the same beginning count as one."""
    order = by_beginning(batch)
    shared, lengths = shared_with_previous(batch, order), batch.lengths[order]
    token = np.arange(lengths.max())
    inside = token < lengths[:, None]
    new = inside & (token >= shared[:, None])  # [S, longest]; what is not new is what stands above it
    above = np.maximum.accumulate(np.where(new, np.arange(len(order))[:, None], 0))
    number = np.cumsum(new).reshape(new.shape) - 1
    where = np.zeros(batch.n_rows, np.int64)
    where[batch.rows_of(order)] = number[above, token][inside]
    return where
