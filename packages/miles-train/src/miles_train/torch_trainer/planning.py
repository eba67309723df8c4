"""Which samples go through the model together, and in which layout: whatever costs least.

The choice is a function of batch and model alone, never of a clock, so that a run that is resumed chooses the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miles_core.batch import Batch

from .layouts import Name, block_widths, by_beginning, shared_with_previous

PER_PARAMETER, PER_HIDDEN, PER_GATHERED, PER_QUERY, PER_PAIR = 0.06, 45.0, 1.0, 200.0, 0.15
"""Nanoseconds of forward and backward, of one row: for each parameter; each layer and hidden unit; each layer and number that is gathered
for attention; each layer and head; each layer, head, head dimension and key. Measured on one Zen 4 core with torch 2.14 in float32, on
models of 0.2 M and 30 M parameters, samples of 25 to 2048 tokens (benchmarks/torch_step.py shows how well they tell). Only ratios matter.
"""
SPREAD = 4
"""In attention a pass may have this many times its rows: they take that much less memory there than in all of a layer."""


@dataclass(frozen=True)
class Costs:
    """What a model's rows cost, in nanoseconds.

    Attributes:
        row: Everything but attention.
        gathered: Being put side by side for attention, and back.
        query: Attention, whatever it looks at.
        key: Attention to one key.
    """

    row: float
    gathered: float
    query: float
    key: float

    @staticmethod
    def of(config: Any, parameters: int) -> Costs:
        """Of a transformers text config, and the number of parameters that a row goes through in its layers."""
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Costs(
            row=PER_PARAMETER * parameters + PER_HIDDEN * layers * config.hidden_size,
            gathered=PER_GATHERED * layers * 2 * (heads + key_heads) * head_dim,
            query=PER_QUERY * layers * heads,
            key=PER_PAIR * layers * heads * head_dim,
        )

    def padded(self, samples: int, longest: int) -> float:
        """Of a pass over samples that are padded to the longest."""
        return samples * longest * (self.row + self.query + self.key * longest)

    def packed(self, rows: int, widths: np.ndarray) -> float:
        """Of a pass over ``rows`` rows, and samples that are ``widths`` (int64 [S]) wide in attention."""
        return self.row * rows + float((widths * (self.gathered + self.query + self.key * widths)).sum())


NOTHING = Costs(0.0, 0.0, 0.0, 0.0)
"""Where there is nothing to choose."""


def plan(batch: Batch, units: np.ndarray, max_tokens: int, names: Sequence[Name], costs: Costs) -> tuple[list[np.ndarray], Name]:
    """Sample indices of micro-batches of at most ``max_tokens`` rows, and their layout: the cheapest.

    Args:
        batch: With ``tokens``.
        units: int64 [S], samples with the same number stay together.
        max_tokens: Most rows of a forward pass, padding included; a longer unit stands alone.
        names: Layouts to choose from.
        costs: Of the model.
    """
    found = {name: planned(batch, units, max_tokens, name, costs) for name in names}
    cheapest = min(names, key=lambda name: found[name][1])
    return found[cheapest][0], cheapest


def planned(batch: Batch, units: np.ndarray, max_tokens: int, name: Name, costs: Costs) -> tuple[list[np.ndarray], float]:
    """Micro-batches of one layout, and what they cost together."""
    order = _order(batch, units, name)
    lengths, widths = batch.lengths[order], block_widths(batch.lengths[order])
    repeated = shared_with_previous(batch, order) if name == "shared" else np.zeros(len(order), np.int64)
    own, wide = (np.r_[0, np.cumsum(x)].tolist() for x in (lengths - repeated, widths))  # sums of what comes before each sample
    first, long = repeated.tolist(), np.maximum.accumulate(lengths).tolist()

    def rows(start: int, end: int) -> int:  # no fewer than there are: a sample may share more with one further back
        if name == "padded":  # in order of length, but for units of several samples
            return (end - start) * long[end - 1]
        return own[end] - own[start] + first[start]

    def fits(start: int, end: int) -> bool:
        return rows(start, end) <= max_tokens and (name == "padded" or wide[end] - wide[start] <= SPREAD * max_tokens)

    def cost(start: int, end: int) -> float:
        if name == "padded":
            return costs.padded(end - start, long[end - 1])
        return costs.packed(rows(start, end), widths[start:end])

    ends = [*(np.flatnonzero(np.diff(units[order])) + 1).tolist(), len(order)]  # of units
    bounds = [0]
    for before, end in zip([0, *ends[:-1]], ends, strict=True):
        if before > bounds[-1] and not fits(bounds[-1], end):
            bounds.append(before)
    parts = list(zip(bounds, [*bounds[1:], len(order)], strict=True))
    return [np.sort(order[start:end]) for start, end in parts], sum(cost(*part) for part in parts)


def _order(batch: Batch, units: np.ndarray, name: Name) -> np.ndarray:
    """Samples unit by unit: in order of length, so that padding costs little, or of their beginnings where these are shared."""
    order = by_beginning(batch) if name == "shared" else np.argsort(batch.lengths, kind="stable")
    last = np.zeros(int(units.max()) + 1, np.int64)
    last[units[order]] = np.arange(len(order))  # a unit stands where its last (longest) sample does
    return order[np.argsort(last[units[order]], kind="stable")]
