"""Which samples go together: optimizer steps, shards and micro-batches. Indices, not data; a unit is never split."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .batch import Batch
from .errors import ConfigError
from .protocols import Unit
from .randomness import generator


def unit_of_all(units: Iterable[Unit]) -> Unit:
    """What must stay together for losses of these units: groups if one of them is a function of pairs or groups, else sequences."""
    return "group" if {"pair", "group"} & set(units) else "sequence"


def units_of(batch: Batch, unit: Unit) -> np.ndarray:
    """int64 [S]: samples with the same number must stay together."""
    return batch.segments.group if unit in ("pair", "group") else batch.segments.trajectory


def optimizer_steps(batch: Batch, unit: Unit, *, epochs: int, minibatches: int, seed_parts: tuple[str | int, ...]) -> list[np.ndarray]:
    """Sample indices of every optimizer step: each epoch goes once over all samples, shuffled by unit when cut up.

    Raises:
        ConfigError: There are fewer units than mini-batches.
    """
    units = units_of(batch, unit)
    names = np.unique(units)
    if len(names) < minibatches:
        found = f"the batch holds only {len(names)} units ({unit})"
        raise ConfigError(f"minibatches is {minibatches}, but {found}; lower it or train on more groups")
    steps = []
    for epoch in range(epochs):
        order = names if minibatches == 1 else generator("optimizer_steps", epoch, *seed_parts).permutation(names)
        for part in np.array_split(order, minibatches):
            steps.append(np.flatnonzero(np.isin(units, part)))
    return steps


def balanced_shards(lengths: np.ndarray, units: np.ndarray, size: int) -> list[np.ndarray]:
    """Sample indices of each of ``size`` shards with nearly equal numbers of rows (longest unit first)."""
    names, inverse = np.unique(units, return_inverse=True)
    weight = np.bincount(inverse, weights=lengths)
    load, owner = np.zeros(size), np.zeros(len(names), np.int64)
    for unit in np.argsort(-weight, kind="stable"):
        owner[unit] = int(np.argmin(load))
        load[owner[unit]] += weight[unit]
    return [np.flatnonzero(owner[inverse] == rank) for rank in range(size)]


def micro_batches(lengths: np.ndarray, units: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Sample indices of micro-batches of at most ``max_tokens`` rows (a longer unit stands alone).

    Units are taken in order of length.

    Args:
        lengths: int64 [S], rows of each sample.
        units: int64 [S], samples with the same number stay together.
        max_tokens: Budget in rows.
    """
    members: dict[int, list[int]] = {}
    for sample, unit in enumerate(units.tolist()):
        members.setdefault(unit, []).append(sample)
    ordered = sorted(members.values(), key=lambda m: max(lengths[s] for s in m))
    parts: list[list[int]] = [[]]
    for unit_samples in ordered:
        grown = parts[-1] + unit_samples
        if parts[-1] and sum(lengths[s] for s in grown) > max_tokens:
            parts.append(list(unit_samples))
        else:
            parts[-1] = grown
    return [np.array(p, np.int64) for p in parts if p]
