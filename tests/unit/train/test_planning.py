"""Which layout a batch gets, and which samples go together: budgets kept, units whole, the cheapest by the formula."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures.samples import answer, sample_id

from miles_core.batch import Batch
from miles_core.refs import SampleRef

pytest.importorskip("torch")

from miles_train.torch_trainer.layouts import block_widths, lay_out
from miles_train.torch_trainer.planning import Costs, plan

LINEAR = Costs(row=100.0, gathered=1.0, query=1.0, key=0.01)
"""Rows cost, attention hardly."""


def batch_of(groups: list[tuple[int, list[int]]], seed: int = 0) -> Batch:
    """Groups by length of the prompt, which is a group's own, and of each answer."""
    rng = np.random.default_rng(seed)
    samples = []
    for g, (prompt, answers) in enumerate(groups):
        tokens = rng.integers(1, 1000, prompt).tolist()
        samples += [answer(sample_id(t, group=f"g{g}"), tokens, rng.integers(1, 1000, n).tolist()) for t, n in enumerate(answers)]
    return Batch.of([SampleRef.of(s) for s in samples]).load(("tokens", "positions"))


ALL = ("padded", "packed", "shared")


@pytest.mark.parametrize(
    ("groups", "costs", "expected"),
    [
        ([(50, [10] * 8)], LINEAR, "shared"),
        ([(5, [10]), (5, [80]), (5, [20])], LINEAR, "packed"),
        ([(20, [12]), (20, [12]), (20, [12])], LINEAR, "padded"),
        ([(50, [10] * 8)], Costs(row=1.0, gathered=100.0, query=0.0, key=0.0), "padded"),  # what is shared would be gathered dearly
    ],
)
def test_the_cheapest_layout_is_taken(groups: list[tuple[int, list[int]]], costs: Costs, expected: str) -> None:
    batch = batch_of(groups)
    each = np.arange(len(batch))
    taken = plan(batch, each, 10_000, ALL, costs)[1]
    assert taken == expected or (taken, expected) == ("shared", "packed")  # nothing to share: they are the same
    assert plan(batch, each, 10_000, ("padded",), costs)[1] == "padded"


@pytest.mark.parametrize("name", ALL)
def test_a_layout_holds_every_row_at_its_position(name: str) -> None:
    batch = batch_of([(5, [3, 3, 40]), (20, [1, 1]), (2, [15])])
    made = lay_out(batch, name)  # ty: ignore[invalid-argument-type]
    assert (made.tokens.flat[made.where] == batch.array("tokens")).all()
    if made.positions is None:
        return
    assert (made.positions.flat[made.where] == batch.array("positions")).all()
    assert made.places is not None
    beside = np.concatenate([block.flatten() for block in made.blocks])
    assert (beside[made.places] == np.arange(made.tokens.size)).all()
    rows = [made.where[batch.rows_of(np.array([s]))].tolist() for s in range(len(batch))]
    assert sorted(rows) == sorted(
        row[: len(own)].tolist() for block in made.blocks for row in block for own in rows if row[: len(own)].tolist() == own
    )


def test_widths_of_blocks_by_hand() -> None:
    lengths = np.array([1, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 1000])
    assert block_widths(lengths).tolist() == [16, 16, 32, 32, 48, 48, 64, 64, 96, 96, 128, 128, 192, 1024]


@pytest.mark.parametrize("names", [("padded",), ("packed",), ("shared",), ALL])
@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10_000])
@pytest.mark.parametrize(
    "costs", [LINEAR, Costs(row=1.0, gathered=0.0, query=0.0, key=0.0), Costs(row=1.0, gathered=2.0, query=0.0, key=0.2)]
)
def test_units_stay_whole_and_budgets_are_kept(names: tuple, max_tokens: int, costs: Costs) -> None:
    batch = batch_of([(20, [5, 9, 30]), (8, [40, 2]), (30, [4] * 6)])
    units = batch.segments.group
    parts, name = plan(batch, units, max_tokens, names, costs)
    assert name in names
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(batch)))
    assert sum(len(set(units[p].tolist())) for p in parts) == 3
    for part in parts:
        layout = lay_out(batch.select(part), name)
        assert layout.tokens.size <= max_tokens or len(set(units[part].tolist())) == 1


def test_a_group_that_shares_its_prompt_fits_where_its_copies_would_not() -> None:
    batch = batch_of([(100, [10] * 8)])
    each = np.arange(len(batch))
    assert len(plan(batch, each, 200, ("shared",), LINEAR)[0]) == 2  # four times 200 rows side by side in attention: six of 128
    assert len(plan(batch, each, 200, ("padded",), LINEAR)[0]) == 8


def test_a_unit_that_is_longer_than_the_budget_gets_what_costs_least() -> None:
    batch, dear = batch_of([(5, [5]), (5, [55]), (5, [25])]), Costs(row=1.0, gathered=100.0, query=0.0, key=0.0)
    together = np.zeros(len(batch), np.int64)
    for max_tokens in (50, 100, 180):
        parts, name = plan(batch, together, max_tokens, ("padded", "packed"), dear)
        assert name == "padded" and len(parts) == 1
