"""A draw depends on what is drawn, never on the batch, the worker or the moment."""

from __future__ import annotations

import hashlib
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.randomness import generator, key, shuffled, uniform

N = 1 << 16


def keys(n: int) -> np.ndarray:
    """Keys of n trajectories of one prompt."""
    return np.array([key(0, "policy", 0, "prompt", i) for i in range(n)], np.uint64)


# ---- keys -----------------------------------------------------------------------------------------------------------

PARTS = (7, "policy", 0, "prompt-1", 3, 0, 0)


@pytest.mark.parametrize(("index", "other"), [(0, 8), (1, "critic"), (2, 1), (3, "prompt-2"), (4, 4), (5, 1), (6, 1)])
def test_every_part_counts(index: int, other: str | int) -> None:
    changed = PARTS[:index] + (other,) + PARTS[index + 1 :]
    assert key(*changed) != key(*PARTS)


def test_parts_do_not_run_together() -> None:
    alike = [(1, 23), (12, 3), (123,), ("1", 23), (1, "23"), ("1,23",), ("1", "2", "3"), ("12", "3"), (), ("",), ("", "")]
    assert len({key(*parts) for parts in alike}) == len(alike)


def test_a_key_is_64_bits_and_stable() -> None:
    """By hand: the first 8 bytes of BLAKE2b-64 of the JSON text, little endian. A change would change every run."""
    expected = int.from_bytes(hashlib.blake2b(b'[7, "policy", 0]', digest_size=8).digest(), "little")
    assert key(7, "policy", 0) == expected
    assert 0 <= key("x") < 2**64 and len({key(i) for i in range(10_000)}) == 10_000


# ---- uniform --------------------------------------------------------------------------------------------------------


def splitmix(x: int) -> int:
    """SplitMix64's finaliser in Python integers, from the paper."""
    m = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & m
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & m
    return x ^ (x >> 31)


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40)), min_size=1, max_size=8))
def test_uniform_is_its_formula(pairs: list[tuple[int, int]]) -> None:
    """In arithmetic modulo 2⁶⁴: mix(mix(key + (position + 1)·φ) xor key), upper 53 bits."""
    given_keys, positions = zip(*pairs, strict=True)
    drawn = uniform(np.array(given_keys, np.uint64), np.array(positions, np.int64))
    golden = 0x9E3779B97F4A7C15
    expected = [(splitmix(splitmix((k + (p + 1) * golden) % 2**64) ^ k) >> 11) / 2**53 for k, p in pairs]
    assert drawn.tolist() == expected


def test_uniform_does_not_depend_on_the_batch() -> None:
    k, p = keys(64), np.arange(64)
    whole = uniform(k, p)
    order = np.random.default_rng(0).permutation(64)
    assert (uniform(k[order], p[order]) == whole[order]).all()
    assert [uniform(k[i : i + 1], p[i : i + 1])[0] for i in range(64)] == whole.tolist()


@pytest.mark.parametrize("axis", ["positions of one key", "one position of many keys", "neighbouring integers as keys"])
def test_uniform_is_uniform_and_uncorrelated(axis: str) -> None:
    """Mean, variance, 64 bins (χ²), correlation at lags 1 to 8, and bins of successive pairs, each within 5 σ."""
    if axis == "positions of one key":
        u = uniform(np.full(N, key(0), np.uint64), np.arange(N))
    elif axis == "one position of many keys":
        u = uniform(keys(N), np.full(N, 17))
    else:
        u = uniform(np.arange(N, dtype=np.uint64), np.zeros(N, np.int64))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 5 * (1 / 12 / N) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / N) ** 0.5
    assert chi_square(np.floor(u * 64), 64) < 63 + 5 * (2 * 63) ** 0.5
    assert chi_square(np.floor(u[:-1:2] * 16) * 16 + np.floor(u[1::2] * 16), 256) < 255 + 5 * (2 * 255) ** 0.5
    for lag in range(1, 9):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / N**0.5


def chi_square(bins: np.ndarray, n: int) -> float:
    count = np.bincount(bins.astype(int), minlength=n)
    expected = len(bins) / n
    return float(((count - expected) ** 2 / expected).sum())


def test_streams_of_related_keys_do_not_overlap() -> None:
    """Keys that differ by SplitMix's own increment, whose plain counters would be shifted copies of each other."""
    base = key(0)
    related = np.array([(base + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(32)], np.uint64)
    drawn = uniform(np.repeat(related, 32), np.tile(np.arange(32), 32))
    assert len(set(drawn.tolist())) == 32 * 32


# ---- generators and permutations ------------------------------------------------------------------------------------


def test_generators_of_different_names_differ() -> None:
    assert generator(0, "data").integers(2**62) == generator(0, "data").integers(2**62)
    assert len({int(generator(0, name).integers(2**62)) for name in ("a", "b", 1, "1")}) == 4


@pytest.mark.parametrize("size", [*range(1, 35), 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_shuffled_is_a_permutation(size: int) -> None:
    assert sorted(shuffled(i, size, "seed", size) for i in range(size)) == list(range(size))


def test_shuffled_differs_by_seed_and_epoch() -> None:
    orders = {tuple(shuffled(i, 100, seed, epoch) for i in range(100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_shuffled_mixes() -> None:
    """Every index lands anywhere alike (χ² over 8 × 8 cells within 5 σ of its 49 degrees), and neighbours part."""
    size, seeds = 1000, 20
    orders = np.array([[shuffled(i, size, seed) for i in range(size)] for seed in range(seeds)])
    cells = np.tile(np.arange(size) * 8 // size, seeds) * 8 + (orders * 8 // size).ravel()
    assert chi_square(cells, 64) < 49 + 5 * (2 * 49) ** 0.5
    neighbours = [abs(a - b) == 1 for order in orders.tolist() for a, b in pairwise(order)]
    assert np.mean(neighbours) < 5 * 2 / size


def test_shuffled_reaches_every_order_of_a_few() -> None:
    seen = {tuple(shuffled(i, 4, seed) for i in range(4)) for seed in range(1000)}
    assert seen == set(permutations(range(4)))


@pytest.mark.parametrize("index", [-1, 10, 11])
def test_shuffled_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"index {index} is outside a permutation of 10"):
        shuffled(index, 10, "seed")
