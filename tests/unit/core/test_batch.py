"""The packed Batch: row p speaks of the token predicted AT p; denominators belong to the optimizer step, however it is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fixtures import strategies
from fixtures.samples import (
    HARD_CASES,
    NAN,
    answer,
    empty_answer,
    moe,
    one_token_answer,
    ragged,
    sample_id,
    shared_image,
    tool_turn,
    two_branches,
    two_policies,
)
from hypothesis import given
from hypothesis import strategies as st

from miles_core.batch import Batch, Segments
from miles_core.columns import COLUMNS, Attachments, Column, Ragged, column_spec
from miles_core.errors import DataError
from miles_core.refs import SampleRef
from miles_core.sample import Sample, SamplingSpan


def pack(samples: list[Sample], *extra: str) -> Batch:
    return Batch.of([SampleRef.of(s) for s in samples]).load(extra)


def rows_of(column: Column) -> list:
    if isinstance(column, Ragged):
        return [column.row(t).tolist() for t in range(len(column))]
    assert isinstance(column, np.ndarray)
    return column.tolist()


# ---- roll and unroll ------------------------------------------------------------------------------------------------


def test_packing_by_hand() -> None:
    """Two samples; loss columns speak of the next token, inputs of their own, the last row of each predicts nothing."""
    first = answer(sample_id(0), [5], [10, 1], logprobs=[-1, -2], version=4, reward=1.0)
    second = answer(sample_id(1), [6, 7], [1], logprobs=[-3], version=5, reward=0.0)
    second.spans = [SamplingSpan(2, 3, temperature=0.5)]
    batch = pack([first, second], "tokens", "targets", "positions", "temperatures")
    expected = {
        "tokens": [5, 10, 1, 6, 7, 1],
        "targets": [10, 1, 0, 7, 1, 0],
        "positions": [0, 1, 2, 0, 1, 2],
        "loss_mask": [True, True, False, False, True, False],
        "versions": [4, 4, -1, -1, 5, -1],
        "logprobs": [-1, -2, NAN, NAN, -3, NAN],
        "temperatures": [1, 1, 1, 1, 0.5, 1],
    }
    for name, values in expected.items():
        np.testing.assert_equal(batch.array(name), np.array(values), err_msg=name)
        assert batch.array(name).dtype.name == column_spec(name).dtypes[0], name
    assert batch.cu_seqlens.tolist() == [0, 3, 6] and batch.n_rows == 6 and len(batch) == 2
    assert batch.lengths.tolist() == [3, 3] and batch.segment.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.rewards.tolist() == [1, 0]


def test_the_tool_turn_packed() -> None:
    """The row before the first injected token is not trained: nothing of the result is predicted by the policy."""
    batch = pack(tool_turn())
    assert batch.array("loss_mask").tolist() == [False, True, True, True, False, False, True, True, False]


def test_routing_belongs_to_the_input() -> None:
    """Row p of routing is of token p itself, which predicts token p + 1: it is not rolled."""
    [sample] = moe()
    routing = pack([sample], "routing").array("routing")
    np.testing.assert_array_equal(routing, sample.columns["routing"])


def test_ragged_columns_roll_too() -> None:
    [sample] = ragged()
    batch = pack([*one_token_answer(), sample], "support")
    assert rows_of(batch.columns["support"]) == [[], [], [], [10, 12, 14], [11, 3], [1], []]


@given(strategies.samples)
def test_row_p_speaks_of_the_token_predicted_at_p(samples: list[Sample]) -> None:
    """Every column of every sample, against the definition, element by element."""
    names = [n for n in dict.fromkeys(n for s in samples for n in s.columns) if n != "images"]
    batch = pack(samples, *names)
    for name in names:
        spec, packed = column_spec(name), rows_of(batch.columns[name])
        for s, sample in enumerate(samples):
            if name not in sample.columns:
                continue
            own, first = rows_of(sample.columns[name]), int(batch.cu_seqlens[s])
            for p in range(len(sample) - 1):
                np.testing.assert_equal(packed[first + p], own[p + 1] if spec.rolled else own[p])


@given(strategies.samples)
def test_unpack_gives_back_what_was_packed(samples: list[Sample]) -> None:
    """Except for index 0 of loss columns, which no row speaks of: it holds the fill, as in every valid sample."""
    names = [n for n in dict.fromkeys(n for s in samples for n in s.columns) if n != "images"]
    batch = pack(samples, *names)
    for name in names:
        for sample, column in zip(samples, batch.unpack(name), strict=True):
            if name in sample.columns and not name.startswith("teacher"):
                np.testing.assert_equal(rows_of(column), rows_of(sample.columns[name]), err_msg=name)
            elif name in sample.columns:
                assert rows_of(column)[1:] == rows_of(sample.columns[name])[1:]


def test_results_are_rolled_back() -> None:
    """Advantages computed on rows land beside the tokens they are for."""
    batch = pack([*one_token_answer(), *two_branches()[:1]])
    batch = batch.with_columns({"advantages": np.array([1, 9, 9, 2, 3, 4, 9], np.float32)})
    assert [rows_of(c) for c in batch.unpack("advantages")] == [[0, 1], [0, 9, 2, 3, 4]]


@pytest.mark.parametrize("name", HARD_CASES)
def test_every_hard_case_packs(name: str) -> None:
    samples = [s for s in HARD_CASES[name]() if s.id.policy in ("policy", "doctor")]
    names = {n for s in samples for n in s.columns} | {"targets", "positions", "temperatures"}
    batch = pack(samples, *sorted(names))
    assert batch.n_rows == sum(map(len, samples))
    assert batch.segments.tokens == sum(int(s.loss_mask.sum()) for s in samples)
    assert all(len(batch.columns[n]) == batch.n_rows for n in names)


def test_a_column_that_a_sample_lacks_is_filled() -> None:
    batch = pack([*moe(), *one_token_answer()], "routing")
    assert (batch.array("routing")[5:] == 255).all() and batch.array("routing").shape == (7, 3, 2)


def test_loading_keeps_what_is_there() -> None:
    batch = pack(one_token_answer())
    changed = batch.with_columns({"logprobs": np.array([-7, NAN], np.float32)})
    assert changed.load(["logprobs", "tokens"]).array("logprobs")[0] == -7


def test_images_stay_over_their_tokens() -> None:
    batch = pack(shared_image(2), "images")
    images = batch.columns["images"]
    assert isinstance(images, Attachments)
    assert [(a.start, a.end) for a in images.items] == [(1, 3), (6, 8)] and len(images) == batch.n_rows == 11
    part = batch.select([1]).load(["images"]).columns["images"]  # not cut by rows: a part loads its own
    assert isinstance(part, Attachments) and [(a.start, a.end) for a in part.items] == [(1, 3)]


# ---- what is wrong is said ------------------------------------------------------------------------------------------


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="no sample is left"):
        Batch.of([])


def test_a_batch_is_of_one_policy() -> None:
    with pytest.raises(DataError, match="one policy; these are of doctor, patient"):
        pack(two_policies())


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"no token column 'advantages'; it has versions, loss_mask, logprobs"):
        pack(moe()).array("advantages")


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match="column 'advantages' has 4 rows, the batch has 5"):
        pack(moe()).with_columns({"advantages": np.zeros(4, np.float32)})


def test_a_part_has_no_steps_of_its_own() -> None:
    """A shard that was asked for optimizer steps would count its own denominators, or train nothing, silently."""
    batch = pack(two_branches())
    for part in (batch.select([0]), batch.context_shard(0, 2)):
        with pytest.raises(DataError, match="part of an optimizer step"):
            next(part.optimizer_steps())


# ---- rewards --------------------------------------------------------------------------------------------------------


def test_rewards_are_of_trajectories() -> None:
    """A branch that was not scored itself carries its trajectory's reward; where nobody scored, there is none."""
    first, second = two_branches()
    other = answer(sample_id(1), [5], [6])
    assert pack([replace(first, reward=None), second]).rewards.tolist() == [1, 1]
    np.testing.assert_array_equal(pack([first, second, other]).rewards, [1, 1, np.nan])
    with pytest.raises(DataError, match="one reward, found"):
        _ = pack([first, replace(second, reward=0.5)]).rewards


# ---- segments and denominators --------------------------------------------------------------------------------------


def four_samples() -> list[Sample]:
    """Group g0: trajectory 0 with branches of 3 and 4 trained tokens, trajectory 1 empty; group g1: one token."""
    first, second = two_branches()
    empty, single = empty_answer()[0], one_token_answer()[0]
    return [first, second, replace(empty, id=sample_id(1)), replace(single, id=sample_id(0, group="g1"))]


def test_segments_by_hand() -> None:
    segments = pack(four_samples()).segments
    assert segments.trajectory.tolist() == [0, 0, 1, 2] and segments.group.tolist() == [0, 0, 0, 1]
    assert segments.sequence_tokens.tolist() == [3, 4, 0, 1] and segments.trajectory_tokens.tolist() == [7, 7, 0, 1]
    assert (segments.tokens, segments.sequences, segments.trajectories) == (8, 3, 2)


def test_trajectories_of_different_groups_differ() -> None:
    """Trajectory 0 of one prompt and trajectory 0 of another are two, wherever their samples stand."""
    samples = [answer(sample_id(0, b, group=g), [5], [6]) for g, b in (("a", 0), ("b", 0), ("a", 1))]
    assert pack(samples).segments.trajectory.tolist() == [0, 1, 0]


def test_a_part_keeps_the_steps_denominators() -> None:
    batch = pack(four_samples(), "tokens")
    part = batch.select([3, 1])
    assert part.array("tokens").tolist() == [5, 1, 5, 1, 10, 11, 20, 21] and part.cu_seqlens.tolist() == [0, 2, 8]
    assert [r.id for r in part.refs] == [batch.refs[3].id, batch.refs[1].id]
    assert part.segments.sequence_tokens.tolist() == [1, 4] and part.segments.trajectory_tokens.tolist() == [1, 7]
    assert (part.segments.tokens, part.segments.sequences, part.segments.trajectories) == (8, 3, 2)


def test_a_part_may_be_empty() -> None:
    """A data-parallel rank that got no sample."""
    part = pack(ragged(), "tokens", "support", "routing").select([])
    assert len(part) == part.n_rows == len(part.columns["support"]) == 0 and part.segments.tokens == 3


def test_every_optimizer_step_counts_for_itself() -> None:
    batch = pack(four_samples()).with_steps([np.array([0, 2]), np.array([1, 3]), np.array([2])])
    counts = [(s.segments.tokens, s.segments.sequences, s.segments.trajectories) for s in batch.optimizer_steps()]
    assert counts == [(3, 1, 1), (5, 2, 2), (0, 0, 0)]
    first = next(batch.optimizer_steps())
    assert first.segments.trajectory_tokens.tolist() == [3, 0], "the other branch is not in this step"


def test_a_batch_is_one_step_unless_told() -> None:
    [step] = pack(four_samples()).optimizer_steps()
    assert len(step) == 4 and step.segments.tokens == 8


def test_a_filter_that_clears_a_mask_changes_the_denominators() -> None:
    batch = pack(four_samples())
    mask = batch.array("loss_mask") & (batch.segment != 0)
    filtered = batch.with_columns({"loss_mask": mask}).counted().segments
    assert (filtered.tokens, filtered.sequences, filtered.trajectories) == (5, 2, 2)
    assert filtered.trajectory_tokens.tolist() == [4, 4, 0, 1]


@given(strategies.batches, st.data())
def test_parts_of_a_step_add_up(batch: Batch, data: st.DataObject) -> None:
    """Token, sequence and trajectory weights, summed over any partition of the samples, are those of the whole."""
    owner = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(batch), max_size=len(batch))))
    totals = np.zeros(3)
    for part in (batch.select(np.flatnonzero(owner == i)) for i in range(3)):
        s = part.segments
        here = s.sequence_tokens
        totals += [here.sum() / max(s.tokens, 1), (here > 0).sum() / max(s.sequences, 1)] + [
            (here / np.maximum(s.trajectory_tokens, 1)).sum() / max(s.trajectories, 1)
        ]
    np.testing.assert_allclose(totals, 1 if batch.segments.tokens else 0, atol=1e-12)


@given(strategies.batches)
def test_segments_against_a_plain_count(batch: Batch) -> None:
    mask = [batch.array("loss_mask")[s:e].sum() for s, e in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)]
    by_trajectory: dict = {}
    for ref, n in zip(batch.refs, mask, strict=True):
        name = (ref.id.group, ref.id.trajectory)
        by_trajectory[name] = by_trajectory.get(name, 0) + int(n)
    s = batch.segments
    assert (s.tokens, s.sequences) == (sum(by_trajectory.values()), sum(n > 0 for n in mask))
    assert s.trajectories == sum(n > 0 for n in by_trajectory.values())
    assert s.trajectory_tokens.tolist() == [by_trajectory[r.id.group, r.id.trajectory] for r in batch.refs]


def test_segments_of_no_sample() -> None:
    nothing = np.zeros(0, np.int64)
    assert Segments.of(nothing, nothing, nothing).tokens == 0


# ---- context parallelism --------------------------------------------------------------------------------------------


def test_zigzag_by_hand() -> None:
    """Eight rows, two ranks, four chunks: rank 0 holds the first and the last."""
    batch = pack([answer(sample_id(), [5], [6] * 7)])
    assert batch.context_rows(0, 2).tolist() == [0, 1, 6, 7] and batch.context_rows(1, 2).tolist() == [2, 3, 4, 5]


@given(strategies.batches, st.integers(1, 4))
def test_context_ranks_hold_every_row_once(batch: Batch, size: int) -> None:
    rows = [batch.context_rows(rank, size) for rank in range(size)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(batch.n_rows))
    for part in rows:
        assert (np.diff(batch.segment[part]) >= 0).all(), "samples stay in order"
        for s in range(len(batch)):
            own = part[batch.segment[part] == s]
            assert (np.diff(own) > 0).all(), "rows of a sample stay in order"
            assert abs(len(own) - batch.lengths[s] / size) <= 2, "and are shared evenly"


@given(strategies.samples, st.integers(1, 3))
def test_a_context_shard_holds_its_rows_and_the_steps_denominators(samples: list[Sample], size: int) -> None:
    batch = pack(samples, "tokens", "routing", "images", "support")
    for rank in range(size):
        shard, rows = batch.context_shard(rank, size), batch.context_rows(rank, size)
        for name in ("tokens", "routing", "loss_mask", "logprobs"):
            np.testing.assert_array_equal(shard.array(name), batch.array(name)[rows])
        assert rows_of(shard.columns["support"]) == [rows_of(batch.columns["support"])[r] for r in rows]
        assert shard.segment.tolist() == batch.segment[rows].tolist() and shard.n_rows == len(rows)
        assert shard.segments is batch.segments and len(shard) == len(batch)
        assert shard.columns["images"] == batch.columns["images"], "images go whole"


def test_whole_columns_are_attachments() -> None:
    """What ``context_shard`` and ``select`` do with ``split="whole"`` is right for attachments only."""
    assert {s.kind for s in COLUMNS.values() if s.split == "whole"} == {"attachment"}
