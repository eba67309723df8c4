"""Which samples go together: every sample once, a unit never split, budgets kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from fixtures import strategies
from fixtures.samples import answer, sample_id
from hypothesis import given
from hypothesis import strategies as st

from miles_core.batch import Batch
from miles_core.errors import ConfigError
from miles_core.plan import balanced_shards, micro_batches, optimizer_steps, units_of
from miles_core.refs import SampleRef

lengths_and_units = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=20).map(
    lambda pairs: (np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs]))
)


def check_partition(parts: list[np.ndarray], units: np.ndarray) -> None:
    """Every sample once; no unit in two parts."""
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(units)))
    owners = [set(units[p].tolist()) for p in parts]
    assert sum(map(len, owners)) == len(set(units.tolist()))


def six_trajectories() -> Batch:
    """Three groups of two trajectories, the first of each with two branches: nine samples."""
    ids = [sample_id(t, b, group=f"g{g}") for g in range(3) for t, b in ((0, 0), (0, 1), (1, 0))]
    return Batch.of([SampleRef.of(answer(i, [5], [6, 7])) for i in ids])


def test_units_by_hand() -> None:
    batch = six_trajectories()
    for unit in ("token", "sequence"):
        assert units_of(batch, unit).tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    for unit in ("pair", "group"):
        assert units_of(batch, unit).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# ---- optimizer steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["token", "sequence", "pair", "group"])
@pytest.mark.parametrize("minibatches", [1, 2, 3])
def test_each_epoch_goes_once_over_everything(unit: str, minibatches: int) -> None:
    batch = six_trajectories()
    steps = optimizer_steps(batch, unit, epochs=2, minibatches=minibatches, seed_parts=(0, 5))  # ty: ignore[invalid-argument-type]
    assert len(steps) == 2 * minibatches
    for epoch in (steps[:minibatches], steps[minibatches:]):
        check_partition(epoch, units_of(batch, unit))  # ty: ignore[invalid-argument-type]
        assert all(len(step) > 0 for step in epoch)


def test_steps_are_shuffled_by_seed_and_epoch_alone() -> None:
    batch = six_trajectories()

    def steps(*seed_parts: int) -> list[list[int]]:
        return [s.tolist() for s in optimizer_steps(batch, "token", epochs=3, minibatches=3, seed_parts=seed_parts)]

    assert steps(0, 1) == steps(0, 1)
    for epoch in range(3):
        orders = {str(steps(0, step)[3 * epoch : 3 * epoch + 3]) for step in range(20)}
        assert len(orders) > 15, "they differ by seed"
    assert any(order[:3] != order[3:6] for order in (steps(0, step) for step in range(3))), "and by epoch"


def test_more_mini_batches_than_units() -> None:
    with pytest.raises(ConfigError, match=r"minibatches is 4, but the batch holds only 3 units \(group\)"):
        optimizer_steps(six_trajectories(), "group", epochs=1, minibatches=4, seed_parts=())


# ---- shards ---------------------------------------------------------------------------------------------------------


def test_shards_by_hand() -> None:
    """Units of 9, 5, 4, 3 rows onto two ranks, longest first: 9 | 5, then 4 to the lighter, 3 to either at 9."""
    shards = balanced_shards(np.array([3, 4, 5, 9]), np.arange(4), 2)
    assert [s.tolist() for s in shards] == [[0, 3], [1, 2]]


@given(lengths_and_units, st.integers(1, 5))
def test_shards_keep_units_whole_and_balance(case: tuple[np.ndarray, np.ndarray], size: int) -> None:
    """Greedy list scheduling (Graham 1966): no rank holds more than the mean plus the longest unit."""
    lengths, units = case
    shards = balanced_shards(lengths, units, size)
    assert len(shards) == size
    check_partition(shards, units)
    longest = max(lengths[units == u].sum() for u in units)
    assert max(lengths[s].sum() for s in shards) <= lengths.sum() / size + longest * (1 - 1 / size) + 1e-9


@given(lengths_and_units)
def test_shards_do_not_depend_on_sample_order(case: tuple[np.ndarray, np.ndarray]) -> None:
    """Loads, that is: which of two equal units goes where may."""
    lengths, units = case
    backwards = balanced_shards(lengths[::-1], units[::-1], 3)
    assert [lengths[::-1][s].sum() for s in backwards] == [lengths[s].sum() for s in balanced_shards(lengths, units, 3)]


# ---- micro-batches --------------------------------------------------------------------------------------------------


def test_micro_batches_by_hand() -> None:
    """Lengths 2 2 3 6 9: 2 + 2 + 3 just fit into 7 rows."""
    lengths, units = np.array([9, 2, 6, 3, 2]), np.arange(5)

    def plan(budget: int) -> list[list[int]]:
        return [sorted(p.tolist()) for p in micro_batches(lengths, units, budget)]

    assert plan(7) == [[1, 3, 4], [2], [0]]
    assert plan(6) == [[1, 4], [3], [2], [0]]


def test_a_unit_longer_than_the_budget_stands_alone() -> None:
    """A pair of 6 + 6 rows is not split under a budget of 8, and nothing is put beside it."""
    parts = micro_batches(np.array([6, 1, 6, 1]), np.array([0, 1, 0, 2]), 8)
    assert [sorted(p.tolist()) for p in parts] == [[1, 3], [0, 2]]


@given(lengths_and_units, st.integers(1, 60))
def test_micro_batches_keep_units_and_budget(case: tuple[np.ndarray, np.ndarray], budget: int) -> None:
    lengths, units = case
    parts = micro_batches(lengths, units, budget)
    check_partition(parts, units)

    def rows(samples: np.ndarray) -> int:
        return int(lengths[samples].sum())

    for part in parts:
        assert rows(part) <= budget or len(set(units[part].tolist())) == 1
    for part, following in pairwise(parts):
        first_unit = following[units[following] == units[following[0]]]
        assert rows(np.concatenate([part, first_unit])) > budget, "a micro-batch is closed only when the next unit does not fit"


@given(strategies.batches, st.integers(4, 60))
def test_micro_batches_of_real_batches(batch: Batch, budget: int) -> None:
    for unit in ("token", "group"):
        units = units_of(batch, unit)
        parts = micro_batches(batch.lengths, units, budget)
        check_partition(parts, units)
        assert sum(batch.select(p).n_rows for p in parts) == batch.n_rows


def test_no_samples() -> None:
    """A data-parallel rank that got none."""
    nothing = np.zeros(0, np.int64)
    assert micro_batches(nothing, nothing, 8) == []
