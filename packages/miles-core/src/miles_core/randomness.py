"""Counter-based randomness (DESIGN §3): a draw depends on what is drawn, never on the batch, the worker or the moment.

A key is a 64-bit hash of names and counters; the draw at a position is a hash of (key, position). Two runs that
schedule differently therefore sample the same tokens from the same distributions.
"""

from __future__ import annotations

import functools
import hashlib
import json

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: str | int) -> int:
    """The 64-bit key of e.g. (run seed, policy, epoch, prompt id, sample index, attempt, branch)."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), element-wise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (key, position) pair.

    Args:
        keys: uint64 [B].
        positions: int64 [B], non-negative.

    Returns:
        float64 [B] with 53 random bits each.
    """
    with np.errstate(over="ignore"):
        counter = _mix(keys.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        bits = _mix(counter ^ keys.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*parts: str | int) -> np.random.Generator:
    """A NumPy generator (Philox, itself counter-based) for one named purpose, e.g. ``generator(seed, "calculator", 17)``."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def shuffled(index: int, size: int, *parts: str | int) -> int:
    """Position ``index`` of a seeded permutation of ``range(size)``, computed alone (no table is kept).

    An 8-round Feistel network over the next power of four, walked until it lands inside the range
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside a permutation of {size}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    rounds = _round_keys(*parts)
    while True:
        left, right = index >> half, index & mask
        for round_key in rounds:
            left, right = right, left ^ (_mix_int(right ^ round_key) & mask)
        index = (left << half) | right
        if index < size:
            return index


@functools.lru_cache(maxsize=64)
def _round_keys(*parts: str | int) -> tuple[int, ...]:
    return tuple(key("shuffled", r, *parts) for r in range(8))


def _mix_int(x: int) -> int:
    bits = 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
    return x ^ (x >> 31)
