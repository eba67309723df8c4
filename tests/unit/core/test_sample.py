"""The Sample: alignment, cutting and joining, and a sentence for every promise that is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fixtures import strategies
from fixtures.samples import (
    HARD_CASES,
    NAN,
    answer,
    continued,
    moe,
    ragged,
    random_samples,
    sample_id,
    shared_image,
    tool_turn,
    truncated,
    two_branches,
    two_policies,
)
from hypothesis import given
from hypothesis import strategies as st

from miles_core.columns import Attachment, Attachments, Blob, Column, Ragged
from miles_core.errors import DataError
from miles_core.refs import GroupRef, SampleRef, policies_of
from miles_core.sample import Group, Sample, SamplingSpan, Status, Turn, trajectory_reward


def same_column(a: Column, b: Column) -> bool:
    """Bit for bit, dtype and shape too."""
    if isinstance(a, Ragged) and isinstance(b, Ragged):
        return same_column(a.values, b.values) and same_column(a.offsets, b.offsets)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b


# ---- meaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HARD_CASES)
def test_hard_cases_keep_the_promises(name: str) -> None:
    for sample in HARD_CASES[name]():
        sample.validate(vocab_size=100, rl=name != "dpo_pair")


@given(strategies.samples)
def test_random_samples_keep_the_promises(samples: list[Sample]) -> None:
    for sample in samples:
        sample.validate(vocab_size=52)


def test_random_samples_have_the_hard_features() -> None:
    """The generator is worth its name: what later tests rely on does occur."""
    samples = [s for seed in range(30) for s in random_samples(seed)]
    assert any(s.n_sampled == 0 for s in samples) and any(s.n_sampled == 1 for s in samples)
    assert any(s.n_sampled and not s.loss_mask.any() for s in samples)
    assert any((s.versions[3:] < 0).any() and s.n_sampled for s in samples), "injected tokens"
    assert any(len(set(s.versions[s.versions >= 0].tolist())) > 1 for s in samples), "several versions"
    assert any(not span.unrestricted for s in samples for span in s.spans)
    assert {"support", "teacher_top_ids", "images"} <= {name for s in samples for name in s.columns}
    assert len({s.id.branch for s in samples}) == 3


def test_alignment_of_the_tool_turn() -> None:
    """Index t of every column speaks of token t; the injected result at 5 and 6 was sampled by nobody."""
    [sample] = tool_turn()
    assert len(sample) == 9 and sample.n_sampled == 5
    assert np.isnan(sample.logprobs).tolist() == (sample.versions < 0).tolist() == [i in (0, 1, 5, 6) for i in range(9)]
    assert sample.loss_mask.tolist() == (sample.versions >= 0).tolist()


def test_dtypes_of_a_sample_from_plain_lists() -> None:
    [sample] = tool_turn()
    assert [sample.columns[n].dtype.name for n in ("tokens", "versions", "loss_mask", "logprobs")] == ["int32", "int32", "bool", "float32"]  # ty: ignore
    bare = Sample.of(sample_id(), [1, 2])
    assert bare.versions.tolist() == [-1, -1] and not bare.loss_mask.any() and np.isnan(bare.logprobs).all()


def test_temperatures_cover_spans_only() -> None:
    sample = answer(sample_id(), [5, 6], [10, 11, 1])
    sample.spans = [SamplingSpan(2, 3, temperature=0.5), SamplingSpan(3, 5, temperature=2.0)]
    assert sample.temperatures().tolist() == [1, 1, 0.5, 2, 2] and sample.temperatures().dtype == np.float32


@pytest.mark.parametrize(
    ("change", "unrestricted"),
    [
        ({}, True),
        ({"temperature": 0.3}, True),
        ({"temperature": 0.0}, False),
        ({"top_p": 0.9}, False),
        ({"top_k": 5}, False),
        ({"min_p": 0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"grammar": "json"}, False),
    ],
)
def test_what_restricts_a_distribution(change: dict, unrestricted: bool) -> None:
    assert SamplingSpan(0, 1, **change).unrestricted is unrestricted


def test_an_aborted_sample_goes_on() -> None:
    """What was sampled before the abort is frozen; the continuation brings its own version, settings and routing."""
    [sample] = continued()
    assert sample.tokens.tolist() == [5, 6, 10, 11, 12, 13, 1]
    assert sample.versions.tolist() == [-1, -1, 3, 3, 5, 5, 5]
    assert sample.status is Status.COMPLETED and sample.reward == 0.5
    assert sample.spans == [SamplingSpan(2, 4), SamplingSpan(4, 7, temperature=0.5)]
    assert sample.turns == [Turn("user", 0, 2), Turn("assistant", 2, 4), Turn("assistant", 4, 7)]
    routing = sample.columns["routing"]
    assert isinstance(routing, np.ndarray)
    assert routing[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 255], "every row but the last is recorded"


# ---- cutting and joining --------------------------------------------------------------------------------------------


@given(strategies.samples, st.data())
def test_a_sample_cut_anywhere_joins_again(samples: list[Sample], data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(samples))
    images = sample.columns.get("images", Attachments((), 0))
    assert isinstance(images, Attachments)
    inside = {t for a in images.items for t in range(a.start + 1, a.end)}
    cut = data.draw(st.integers(1, len(sample) - 1).filter(lambda c: c not in inside))
    joined = Sample.concat([sample.slice(0, cut), sample.slice(cut, len(sample))])
    assert joined.columns.keys() == sample.columns.keys()
    for name, column in sample.columns.items():
        assert same_column(joined.columns[name], column), name
    assert joined.temperatures().tolist() == sample.temperatures().tolist()
    assert joined.id == sample.id and joined.reward == sample.reward
    joined.validate()


def test_slice_clips_spans_and_turns() -> None:
    [sample] = tool_turn()
    part = sample.slice(3, 8)
    assert part.tokens.tolist() == [31, 32, 33, 2, 34]
    assert part.spans == [SamplingSpan(0, 2), SamplingSpan(4, 5)]
    assert part.turns == [Turn("assistant", 0, 2), Turn("tool", 2, 4), Turn("assistant", 4, 5)]


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 6), (3, 3), (4, 2)])
def test_slice_outside_the_sample_is_refused(start: int, end: int) -> None:
    with pytest.raises(DataError, match=r"policy/g0/t0\.b0@0: cannot cut out tokens"):
        ragged()[0].slice(start, end)


def test_a_part_without_a_column_gives_its_fill() -> None:
    """A tool's result has no routing, no support and no image; joined to a part that has, its rows hold the fill."""
    [with_routing], [with_support], [with_image, *_] = moe(), ragged(), shared_image()
    plain = Sample.of(sample_id(), [7, 8])
    joined = Sample.concat([with_routing, plain, with_support, plain, with_image])
    routing, support, images = (joined.columns[n] for n in ("routing", "support", "images"))
    assert isinstance(routing, np.ndarray) and isinstance(support, Ragged) and isinstance(images, Attachments)
    assert routing.dtype == np.uint8 and (routing[4:] == 255).all()
    assert [support.row(t).tolist() for t in range(5, 14)] == [[], [], [], [], [10, 12, 14], [11, 3], [1], [], []]
    assert [(a.start, a.end) for a in images.items] == [(15, 17)] and len(images) == len(joined)


def test_two_models_routing_does_not_join() -> None:
    with pytest.raises(DataError, match=r"'routing'.*uint16.*uint8"):
        Sample.concat([moe("uint8")[0], moe("uint16")[0]])


# ---- validate -------------------------------------------------------------------------------------------------------


def put(name: str, index: int, value: float) -> Callable[[Sample], None]:
    """Set one value of a token column."""

    def change(sample: Sample) -> None:
        column = sample.columns[name]
        assert isinstance(column, np.ndarray)
        column[index] = value

    return change


def column(name: str, value: Column | list) -> Callable[[Sample], None]:
    """Replace or add a column."""
    return lambda sample: sample.columns.update({name: value})  # ty: ignore


def spans(*items: SamplingSpan) -> Callable[[Sample], None]:
    """Replace the sampling spans."""
    return lambda sample: setattr(sample, "spans", list(items))


BLOB = Blob({"x": np.zeros(1)})
T = 5

# What is broken in ragged() (tokens 5 6 | 10 11 1, the last three sampled and trained), and what the message says.
BREAKAGES: list[tuple[str, Callable[[Sample], object], str]] = [
    ("a column is missing", lambda s: s.columns.pop("versions"), "column 'versions' is missing"),
    ("tokens are missing", lambda s: s.columns.pop("tokens"), "column 'tokens' is missing"),
    ("no tokens", lambda s: s.columns.update(Sample.of(s.id, []).columns), "column 'tokens' is empty"),
    ("undeclared column", column("surprise", np.zeros(T)), "column 'surprise' is not declared.*register_column"),
    ("a list", column("versions", [-1, -1, 3, 3, 3]), "column 'versions' is a list, but token columns are ndarray"),
    ("an array for a ragged", column("support", np.zeros(T, np.int32)), "column 'support' is a ndarray, but ragged columns are Ragged"),
    ("response only", column("advantages", np.zeros(3, np.float32)), "column 'advantages' has 3 rows, but the sample has 5 tokens"),
    ("T − 1", column("old_logprobs", np.zeros(4, np.float32)), "column 'old_logprobs' has 4 rows, but the sample has 5 tokens"),
    ("ragged too short", column("support", Ragged.of([[1]], "int32")), "column 'support' has 1 rows, but the sample has 5 tokens"),
    ("attachments too long", column("images", Attachments((), 6)), "column 'images' has 6 rows, but the sample has 5 tokens"),
    ("dtype", column("tokens", np.zeros(T, np.int64)), "column 'tokens' has dtype int64, expected int32"),
    ("dtype of choice", column("routing", np.zeros((T, 1, 1), np.int32)), "column 'routing' has dtype int32, expected uint8 or uint16"),
    ("ragged dtype", column("support", Ragged.of([[1]] * T, "int64")), "column 'support' has dtype int64, expected int32"),
    ("axes", column("routing", np.zeros((T, 2), np.uint8)), r"column 'routing' has shape \[5, 2\], expected 3 axes"),
    (
        "offsets fall",
        column("support", Ragged(np.zeros(2, np.int32), np.array([0, 2, 1, 2, 2, 2]))),
        "column 'support' has offsets that do not",
    ),
    ("offsets end early", column("support", Ragged(np.zeros(9, np.int32), np.arange(6))), "column 'support' has offsets .* from 0 to 9"),
    (
        "offsets start late",
        column("support", Ragged(np.zeros(6, np.int32), np.arange(1, 7))),
        "column 'support' has offsets that do not rise",
    ),
    ("offsets' dtype", column("support", Ragged(np.zeros(5, np.int32), np.arange(6.0))), "column 'support' has offsets of dtype float64"),
    ("attachment outside", column("images", Attachments((Attachment(3, 6, BLOB),), T)), r"column 'images' has an attachment over \[3, 6\)"),
    ("attachment empty", column("images", Attachments((Attachment(3, 3, BLOB),), T)), r"column 'images' has an attachment over \[3, 3\)"),
    (
        "attachments out of order",
        column("images", Attachments((Attachment(2, 3, BLOB), Attachment(0, 1, BLOB)), T)),
        "column 'images' has attachments out of order",
    ),
    ("negative token", put("tokens", 3, -1), "column 'tokens' holds id -1 at index 3"),
    (
        "token beyond the vocabulary",
        put("tokens", 3, 100),
        "column 'tokens' holds id 100 at index 3; ids must be below the vocabulary size 100",
    ),
    ("version −2", put("versions", 0, -2), "column 'versions' holds -2; −1 means not sampled"),
    ("first token sampled", lambda s: (put("versions", 0, 3)(s), put("logprobs", 0, -1)(s)), "column 'versions' marks token 0"),
    ("first token trained", put("loss_mask", 0, True), "column 'loss_mask' marks token 0"),
    ("sampled without logprob", put("logprobs", 3, NAN), "column 'logprobs' is NaN though the token was sampled at index 3"),
    ("logprob without sampling", put("logprobs", 1, -1), "column 'logprobs' is a number though the token was not sampled at index 1"),
    ("logprob positive", put("logprobs", 3, 0.1), "column 'logprobs' holds 0.1 at index 3"),
    ("logprob −∞", put("logprobs", 3, -np.inf), "column 'logprobs' holds -inf at index 3"),
    ("logprob +∞", put("logprobs", 3, np.inf), "column 'logprobs' holds inf at index 3"),
    (
        "routing of the last token",
        column("routing", np.zeros((T, 1, 1), np.uint8)),
        "column 'routing' has a recorded last row; token T−1 was never",
    ),
    ("span outside", spans(SamplingSpan(2, 6)), r"sampling span \[2, 6\)"),
    ("span empty", spans(SamplingSpan(2, 2)), r"sampling span \[2, 2\)"),
    ("spans overlap", spans(SamplingSpan(2, 4), SamplingSpan(3, 5)), r"sampling span \[3, 5\)"),
    ("spans out of order", spans(SamplingSpan(4, 5), SamplingSpan(2, 4)), r"sampling span \[2, 4\)"),
    ("turn outside", lambda s: setattr(s, "turns", [Turn("user", -1, 2)]), r"turn \[-1, 2\)"),
    ("prompt trained", put("loss_mask", 1, True), "column 'loss_mask' trains index 1, which was not sampled"),
    ("no span", spans(SamplingSpan(2, 4)), "column 'loss_mask' trains index 4, which no sampling span covers"),
    ("greedy", spans(SamplingSpan(2, 5, temperature=0)), r"column 'loss_mask' trains tokens of the span \[2, 5\) sampled greedily"),
    ("penalty", spans(SamplingSpan(2, 5, repetition_penalty=1.1)), r"span \[2, 5\) sampled with penalties.*sample without"),
    (
        "no support",
        lambda s: s.columns.pop("support"),
        r"span \[2, 5\) whose support was restricted.*'support' does not hold.* 10 at index 2",
    ),
    (
        "support lacks the sampled token",
        column("support", Ragged.of([[], [], [10], [7, 8], [1]], "int32")),
        "column 'support' does not hold the sampled token 11 at index 3; record it or sample unrestricted",
    ),
    (
        "support of the next token",
        column("support", Ragged.of([[], [10], [11], [1], []], "int32")),
        "column 'support' does not hold the sampled token 10 at index 2",
    ),
    ("reward NaN", lambda s: setattr(s, "reward", NAN), "reward is nan"),
    ("reward infinite", lambda s: setattr(s, "reward", np.inf), "reward is inf"),
]


@pytest.mark.parametrize(("change", "message"), [b[1:] for b in BREAKAGES], ids=[b[0] for b in BREAKAGES])
def test_what_is_broken_is_named(change: Callable[[Sample], object], message: str) -> None:
    [sample] = ragged()
    sample.validate(vocab_size=100)
    change(sample)
    with pytest.raises(DataError, match=f"sample policy/g0/t0.b0@0: .*{message}"):
        sample.validate(vocab_size=100)


@pytest.mark.parametrize(
    "change",
    [
        put("loss_mask", 1, True),
        spans(),
        spans(SamplingSpan(2, 5, temperature=0)),
        spans(SamplingSpan(2, 5, repetition_penalty=2)),
        lambda s: s.columns.pop("support"),
    ],
)
def test_what_only_rl_asks_for(change: Callable[[Sample], object]) -> None:
    [sample] = ragged()
    change(sample)
    with pytest.raises(DataError):
        sample.validate()
    sample.validate(rl=False)


def test_untrained_tokens_may_come_from_anywhere() -> None:
    """An evaluation is greedy; nothing of it is trained."""
    [sample] = ragged()
    sample.loss_mask[:] = False
    sample.columns.pop("support")
    for span in (SamplingSpan(2, 5, temperature=0), SamplingSpan(2, 5, repetition_penalty=2), SamplingSpan(2, 5, grammar="json")):
        sample.spans = [span]
        sample.validate()


# ---- groups and refs ------------------------------------------------------------------------------------------------


def test_a_trajectory_has_one_reward() -> None:
    first, second = two_branches()
    assert trajectory_reward([first, second]) == 1.0
    assert trajectory_reward([replace(first, reward=None), second]) == 1.0
    for rewards in ([1.0, 0.0], [None, None]):
        with pytest.raises(DataError, match=r"t0.b0@0: expected one reward"):
            trajectory_reward([replace(s, reward=r) for s, r in zip((first, second), rewards, strict=True)])


def test_a_group_counts_trajectories_once() -> None:
    first, second = two_branches()
    other = answer(sample_id(1), [5, 1], [12], reward=0.0)
    group = Group("g0", [second, other, first])
    assert [[s.id.branch for s in samples] for samples in group.trajectories().values()] == [[0, 1], [0]]
    assert group.rewards() == {"policy": [1.0, 0.0]}


def test_two_policies_of_an_episode_have_rewards_of_their_own() -> None:
    assert Group("g0", two_policies()).rewards() == {"doctor": [1.0], "patient": [-1.0]}


def test_a_ref_says_what_the_controller_asks() -> None:
    [sample] = continued()
    ref = SampleRef.of(sample)
    assert (ref.id, ref.length, ref.sampled, ref.trained, ref.reward) == (sample.id, 7, 5, 5, 0.5)
    assert ref.versions == (3, 5) and ref.status is Status.COMPLETED and ref.get() is sample
    assert SampleRef.of(HARD_CASES["dpo_pair"]()[0]).versions == (-1, -1)
    assert SampleRef.of(truncated()[0]).status is Status.TRUNCATED


def test_a_group_ref_gives_its_group() -> None:
    group = Group("g0", two_policies())
    ref = GroupRef.of(group, position=4)
    assert ref.position == 4 and ref.get().samples == group.samples
    assert policies_of([ref, ref]) == ["doctor", "patient"]
