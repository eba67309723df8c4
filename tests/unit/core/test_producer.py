"""The producer: every prompt that was started is ready, dropped or in flight, and whatever fails says which group it was."""

from __future__ import annotations

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest
from fixtures.samples import answer

from miles_core.buffer import Buffer
from miles_core.cursor import Cursor
from miles_core.errors import DataError, InfrastructureFailure, RunError
from miles_core.producer import Producer
from miles_core.protocols import Players, Prompt
from miles_core.sample import SampleId, Status
from miles_core.scoring import Scorer

VOCAB = 50


class Prompts:
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return Prompt(str(index), "")


def members(prompt, context, n=2, version=0, **fields):
    """A group of n trajectories."""
    ids = [SampleId(context.run, "policy", prompt.id, context.group, t, attempt=context.attempt) for t in range(n)]
    return [answer(id, [5, 6], [10, 11], version=version, **{"reward": 1.0, **fields}) for id in ids]


async def good(prompt, context):
    return members(prompt, context)


def producer(rollout, *, groups=2, steps=1, max_staleness=0, shuffle=False, **options):
    buffer = Buffer(groups, max_staleness, steps)
    players = Players("run", 0, ("policy",), {}, {}, {"policy": VOCAB})
    defaults = {"scorer": Scorer({}, None), "filters": {}, "group_seconds": 60.0}
    return Producer(buffer, Cursor(Prompts(), 0, shuffle), rollout, players, **(defaults | options))


async def take(made, seconds=60):
    async with made:
        return await made.buffer.take(seconds)


async def complaint(rollout, error, **options):
    made = producer(rollout, **options)
    with pytest.raises(error) as found:
        await take(made)
    return str(found.value)


# ---- what goes well ------------------------------------------------------------------------------------------------------


async def test_groups_come_with_their_position_epoch_and_policy():
    made = producer(good, groups=3)
    groups = await take(made)
    assert [(g.id, g.position) for g in groups] == [("e0-0", 0), ("e0-1", 1), ("e0-2", 2)]
    assert all(len(g.refs) == 2 and g.refs[0].id.policy == "policy" for g in groups)
    later = producer(good, groups=1, position=205)
    assert [(g.id, g.position) for g in await take(later)] == [("e2-5", 205)]


async def test_as_many_run_at_once_as_admission_allows_and_no_more():
    running, most, full = 0, [], asyncio.Event()

    async def slow(prompt, context):
        nonlocal running
        running += 1
        most.append(running)
        if running == 6:
            full.set()
        version = made.buffer.counts.version
        await asyncio.wait_for(full.wait(), 60)
        await asyncio.sleep(0.001)
        running -= 1
        return members(prompt, context, version=version)

    made = producer(slow, groups=3, steps=5, max_staleness=1)
    async with made:
        for _ in range(5):
            await made.buffer.take(60)
            await made.buffer.published()
    assert max(most) == 6 and made.buffer.counts.started == made.position == 15


async def test_what_was_in_flight_at_the_cut_is_issued_first():
    made = producer(good, groups=4, reissue=[3, 5], position=7)
    assert [g.position for g in await take(made)] == [3, 5, 7, 8]
    assert made.position == 9


# ---- infrastructure ------------------------------------------------------------------------------------------------------


async def test_a_group_whose_infrastructure_failed_is_issued_again_as_another_attempt():
    seen = []

    async def flaky(prompt, context):
        seen.append((context.group, context.attempt))
        if context.attempt < 2:
            raise InfrastructureFailure("the engine died")
        return members(prompt, context)

    [group] = await take(producer(flaky, groups=1))
    assert seen == [("e0-0", 0), ("e0-0", 1), ("e0-0", 2)]
    assert {r.id.attempt for r in group.refs} == {2}


async def test_so_is_one_whose_scoring_failed(monkeypatch):
    scoring, attempts = Scorer({}, None), []

    async def score_group(samples):
        attempts.append(samples[0].id.attempt)
        if len(attempts) < 3:
            raise InfrastructureFailure("the judge is down")

    monkeypatch.setattr(scoring, "score_group", score_group)
    [group] = await take(producer(good, groups=1, scorer=scoring))
    assert attempts == [0, 1, 2] and {r.id.attempt for r in group.refs} == {2}
    attempts.clear()
    said = await complaint(good, RunError, groups=1, scorer=scoring, attempts=2)
    assert said == "group e0-0 failed 2 times, last: the judge is down"


async def test_it_is_issued_only_so_often():
    calls = []

    async def dead(prompt, context):
        calls.append(context.attempt)
        raise InfrastructureFailure("no engine is left")

    said = await complaint(dead, RunError, groups=1, attempts=4)
    assert said == "group e0-0 failed 4 times, last: no engine is left" and calls == [0, 1, 2, 3]


@pytest.mark.parametrize("status", [Status.FAILED, Status.ABORTED])
async def test_a_sample_that_did_not_end_is_never_scored_but_issued_again(status):
    async def flaky(prompt, context):
        return members(prompt, context, status=status if context.attempt == 0 else Status.TRUNCATED)

    [group] = await take(producer(flaky, groups=1))
    assert {(r.status, r.id.attempt) for r in group.refs} == {(Status.TRUNCATED, 1)}


# ---- mistakes ------------------------------------------------------------------------------------------------------------


async def test_an_exception_in_the_rollout_is_named_and_kept():
    async def broken(prompt, context):
        return 1 / 0

    made = producer(broken, groups=1)
    with pytest.raises(RunError, match="rollout of group e0-0 failed: ZeroDivisionError: division by zero") as found:
        await take(made)
    assert isinstance(found.value.__cause__, ZeroDivisionError)
    assert made.buffer.counts.taken == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda samples, context: [], "rollout of group e0-0 gave no samples"),
        (lambda samples, context: [samples[0], samples[0]], r"two samples are called policy/e0-0/t0\.b0@0; give each trajectory"),
        (lambda samples, context: [with_id(samples[0], group="e0")], r"sample policy/e0/t0.* was given for group e0-0"),
        (lambda samples, context: [with_id(samples[0], policy="plicy")], r"plicy/e0-0/t0.* belongs to no policy of this stage \(policy\)"),
        (lambda samples, context: [with_token(samples[0], VOCAB)], r"sample policy/e0-0/t0.* holds id 50 .* vocabulary size 50"),
        (lambda samples, context: [with_mask(samples[0])], r"sample policy/e0-0/t0.*'loss_mask' trains index 1, which was not sampled"),
    ],
)
async def test_samples_that_cannot_be_right_stop_the_run_and_are_named(change, expected):
    async def rollout(prompt, context):
        return change(members(prompt, context), context)

    with pytest.raises(DataError, match=expected):
        await take(producer(rollout, groups=1))


def with_id(sample, **changes):
    sample.id = SampleId(**(vars(sample.id) | changes))
    return sample


def with_token(sample, token):
    sample.tokens[-1] = token
    return sample


def with_mask(sample):
    sample.loss_mask[:] = [False, True, True, True]
    return sample


async def test_a_group_that_takes_too_long_is_named():
    async def hangs(prompt, context):
        await asyncio.Event().wait()

    said = await complaint(hangs, RunError, groups=1, group_seconds=0.02)
    assert said == "the producer waited 0.02 s for group e0-0 (rollout and rewards). Raise deadlines.group."


# ---- groups that are replaced --------------------------------------------------------------------------------------------


class Four:
    """A rollout that wants four trajectories and gets fewer of every third prompt."""

    config = SimpleNamespace(group_size=4)

    async def __call__(self, prompt, context):
        return members(prompt, context, 1 if int(prompt.id) % 3 == 0 else 3)


async def test_a_group_of_one_is_replaced_where_a_group_was_wanted():
    made = producer(Four(), groups=3)
    assert [g.position for g in await take(made)] == [1, 2, 4]
    assert made.buffer.counts.reasons == {"fewer than 2 trajectories": 2}
    assert made.buffer.counts.started == 5


async def test_a_group_of_one_is_fine_where_one_was_wanted():
    async def single(prompt, context):
        return members(prompt, context, 1)

    assert len(await take(producer(single))) == 2


async def test_filters_are_asked_in_order_and_give_the_reason():
    filters = {"even": lambda g: "odd" if int(g.id[3:]) % 2 else None, "small": lambda g: "big" if int(g.id[3:]) > 3 else None}
    made = producer(good, groups=2, filters=filters)
    assert [g.position for g in await take(made)] == [0, 2]
    only_even = producer(good, groups=3, filters={"even": filters["even"]})
    assert [g.position for g in await take(only_even)] == [0, 2, 4]
    assert only_even.buffer.counts.reasons == {"even: odd": 2}


@pytest.mark.parametrize("verdict", [True, False, 0])
async def test_a_filter_that_answers_yes_or_no_is_told_what_to_answer(verdict):
    said = await complaint(good, DataError, filters={"mine": lambda g: verdict})
    assert said == f"group filter 'mine' gave {verdict!r} for group e0-0; it gives None to keep it, or a reason as text"


# ---- in flight -----------------------------------------------------------------------------------------------------------


async def test_leaving_cancels_everything_and_remembers_the_positions():
    started, gave_up, all_started = [], [], asyncio.Event()

    async def hangs(prompt, context):
        started.append(prompt.id)
        if len(started) == 3:
            all_started.set()
        try:
            await asyncio.Event().wait()
        finally:
            gave_up.append(prompt.id)

    made = producer(hangs, groups=3, reissue=[7])
    async with made:
        await asyncio.wait_for(all_started.wait(), 60)
        assert made.in_flight() == [0, 1, 7]
    assert made.in_flight() == [0, 1, 7]  # the cut at the end of a run is taken after it was left
    assert sorted(gave_up) == ["0", "1", "7"]
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_group_that_failed_is_in_flight_still_so_that_resume_issues_it_again():
    async def second_fails(prompt, context):
        if prompt.id == "1":
            raise ValueError("mine")
        return members(prompt, context)

    made = producer(second_fails, groups=2)
    with pytest.raises(RunError, match="e0-1"):
        await take(made)
    assert made.in_flight() == [1] and [g.position for g in made.buffer.ready] == [0]


@pytest.mark.parametrize("seed", range(12))
async def test_every_position_is_ready_dropped_taken_or_in_flight_at_any_moment(seed):
    rng = random.Random(seed)
    dropped, taken = set(), set()

    async def slow(prompt, context):
        version = made.buffer.counts.version
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        return members(prompt, context, version=version)

    def dull(group):
        if rng.random() < 0.3:
            dropped.add(int(group.id[3:]))
            return "dull"
        return None

    def look():
        ready, flying = [g.position for g in made.buffer.ready], made.in_flight()
        everywhere = sorted([*ready, *flying, *taken])
        assert len(set(everywhere)) == len(everywhere)  # nowhere twice
        missing = set(range(made.position)) - set(everywhere)
        assert missing <= dropped

    made = producer(slow, groups=2, steps=8, max_staleness=rng.randrange(3), filters={"dull": dull})
    made.on_group = lambda group: look()

    async def watch():
        while True:
            look()
            await asyncio.sleep(0)

    watching = asyncio.ensure_future(watch())
    async with made:
        for _ in range(rng.randrange(1, 8)):
            taken |= {g.position for g in await made.buffer.take(60)}
            await made.buffer.published()
        if watching.done():
            watching.result()
    watching.cancel()
    look()
    assert set(made.in_flight()) | {g.position for g in made.buffer.ready} | taken | dropped >= set(range(made.position))


async def test_a_prompt_that_does_not_come_stops_nothing_but_its_step(monkeypatch):
    """A source that waits for a disk or a network leaves the event loop free, and its deadline says what was waited for."""
    there = threading.Event()
    monkeypatch.setattr(Prompts, "__getitem__", lambda self, index: there.wait(20) and Prompt(str(index), ""))
    made = producer(good, group_seconds=0.05)
    try:
        with pytest.raises(RunError, match=r"the producer waited 0\.05 s for the prompt at position 0"):
            await take(made)
    finally:
        there.set()
