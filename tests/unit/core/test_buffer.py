"""The buffer keeps ``max_staleness`` by admission alone, whatever order groups start, end and are dropped in."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.buffer import Buffer
from miles_core.errors import DataError, RunError
from miles_core.refs import GroupRef, InlineHandle, SampleRef
from miles_core.sample import Sample, SampleId, Status


def group(position, *versions, id=None):
    """A group of one sample, sampled by versions from the first to the last given; not sampled at all if none is."""
    name = id or f"g{position}"
    sample_id = SampleId("run", "policy", name, name)
    span = (versions[0], versions[-1]) if versions else (-1, -1)
    handle = InlineHandle(Sample.of(sample_id, [0, 1]))
    return GroupRef(name, position, (SampleRef(sample_id, 2, len(versions), len(versions), 1.0, {}, span, Status.COMPLETED, handle),))


async def settled(awaitable):
    """The task of something that can only end at once, after it had its chance."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(10):
        await asyncio.sleep(0)
    return task


async def now(awaitable):
    """What it gives, at once."""
    task = await settled(awaitable)
    assert task.done(), "it waits"
    return task.result()


async def waits(awaitable):
    """Whether it does not end by itself."""
    task = await settled(awaitable)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return task.cancelled()


# ---- the property --------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A buffer driven at random, beside counts of our own."""

    groups: int
    max_staleness: int
    steps: int
    buffer: Buffer = field(init=False)
    flying: list[tuple[int, int]] = field(default_factory=list)
    """(position, version at the start) of what was started and has not ended."""
    ready: list[tuple[int, int]] = field(default_factory=list)
    started: int = 0
    dropped: int = 0
    version: int = 0

    def __post_init__(self):
        self.buffer = Buffer(self.groups, self.max_staleness, self.steps)

    async def start(self):
        allowed = self.groups * min(self.version + self.max_staleness + 1, self.steps)
        if self.started - self.dropped == allowed:
            assert await waits(self.buffer.admit()), "one more than the bound was admitted"
            return False
        assert self.started - self.dropped < allowed
        started = await now(self.buffer.admit())
        assert started == self.version
        self.flying.append((self.started, started))
        self.started += 1
        return True

    async def end(self, which, newest):
        position, started = self.flying.pop(which % len(self.flying))
        self.ready.append((position, started))
        last = min(self.version, started + newest)  # long ones go on over publishes
        await now(self.buffer.put(group(position, started, last), started))

    async def drop(self, which):
        _, started = self.flying.pop(which % len(self.flying))
        self.dropped += 1
        await now(self.buffer.drop("dull", started))

    async def take(self):
        too_old_a_step_later = any(started <= self.version - self.max_staleness for _, started in self.flying)
        if len(self.ready) < self.groups or too_old_a_step_later:
            assert await waits(self.buffer.take(60)), "taken too early"
            return False
        taken = [g.position for g in await now(self.buffer.take(60))]
        assert taken == sorted(taken) and len(taken) == self.groups
        ages = [self.version - started for position, started in self.ready if position in taken]
        assert len(ages) == self.groups and max(ages) <= self.max_staleness
        self.ready = [r for r in self.ready if r[0] not in taken]
        self.version += 1
        await now(self.buffer.published())
        return True


moves = st.tuples(st.sampled_from(["start", "start", "end", "end", "drop", "take"]), st.integers(0, 20), st.integers(0, 3))


@settings(max_examples=100)
@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 4), st.lists(moves, max_size=60))
def test_whatever_happens_nothing_is_started_beyond_the_bound_or_trained_too_old(groups, max_staleness, steps, moves):
    async def play():
        model = Model(groups, max_staleness, steps)
        for move, which, newest in moves:
            if move == "start":
                await model.start()
            elif move == "take" and model.version < steps:
                await model.take()
            elif move == "end" and model.flying:
                await model.end(which, newest)
            elif move == "drop" and model.flying and model.dropped < 20:
                await model.drop(which)
        while model.version < steps:  # it always comes to an end, and nothing was started that is not trained
            while await model.start():
                pass
            while model.flying:
                await model.end(-1, 3)
            assert await model.take()
        assert model.started - model.dropped == groups * steps
        assert not model.ready and not model.buffer.ready
        counts = model.buffer.counts
        assert (counts.started, counts.dropped, counts.taken, counts.version) == (model.started, model.dropped, groups * steps, steps)

    asyncio.run(play())


# ---- examples ------------------------------------------------------------------------------------------------------------


async def fill(buffer, *groups):
    for g in groups:
        await buffer.put(g, await now(buffer.admit()))


async def test_a_step_waits_for_the_slow_group_that_would_be_too_old_for_the_next():
    """Group 0 was sampled at once, but its reward takes its time: with max_staleness 1 it is trained in the second step."""
    buffer = Buffer(1, 1, 10)
    slow = await now(buffer.admit())
    await fill(buffer, group(1, 0))
    assert [g.position for g in await now(buffer.take(60))] == [1]
    await buffer.published()
    await fill(buffer, group(2, 1))
    assert await waits(buffer.take(60))
    await buffer.put(group(0, 0), slow)
    assert [g.position for g in await now(buffer.take(60))] == [0]


async def test_groups_come_in_the_order_of_the_data():
    buffer = Buffer(3, 0, 1)
    await fill(buffer, group(2, 0), group(0, 0), group(1, 0))
    assert [g.position for g in await buffer.take(60)] == [0, 1, 2]


async def test_what_was_read_not_sampled_has_no_age():
    buffer = Buffer(1, 0, 3)
    for step in range(3):
        await fill(buffer, group(step))
        assert len(await buffer.take(60)) == 1
        await buffer.published()


async def test_groups_that_were_taken_in_vain_are_there_again():
    buffer = Buffer(2, 0, 2)
    await fill(buffer, group(0, 0), group(1, 0))
    buffer.put_back(await buffer.take(60))
    assert buffer.counts.taken == 0
    assert [g.position for g in await now(buffer.take(60))] == [0, 1]


async def test_the_time_limit_says_how_far_it_came():
    buffer = Buffer(4, 0, 1)
    await now(buffer.admit())
    taking = asyncio.ensure_future(buffer.take(0.5))
    await fill(buffer, group(0, 0), group(1, 0))  # they come while it waits
    with pytest.raises(RunError, match=r"the loop waited 0\.5 s for 4 groups \(2 were ready, 1 in flight\)\. Raise deadlines\.rollout"):
        await taking


async def test_a_failure_reaches_who_takes_now_and_who_takes_later():
    buffer = Buffer(1, 0, 1)
    failure = RunError("no prompt is left")
    taking = await settled(buffer.take(60))
    await buffer.fail(failure)
    await buffer.fail(RunError("a second one, which only follows from it"))
    for take in (taking, buffer.take(60)):
        with pytest.raises(RunError, match="no prompt is left") as found:
            await take
        assert found.value is failure


async def test_a_filter_that_drops_everything_ends_the_run_with_the_counts():
    buffer = Buffer(2, 0, 10)
    with pytest.raises(
        RunError, match=r"101 of 101 groups were dropped \(uniform: 100, too long: 1\)\. Relax the filter or change the data"
    ):
        for n in range(1000):
            await buffer.drop("too long" if n == 0 else "uniform", await now(buffer.admit()))


async def test_a_filter_that_drops_much_is_no_error():
    buffer = Buffer(1, 0, 200)
    for step in range(100):
        for _ in range(15):
            await buffer.drop("uniform", await now(buffer.admit()))
        await fill(buffer, group(step, step))
        await buffer.take(60)
        await buffer.published()
    assert buffer.counts.reasons == {"uniform": 1500}


async def test_a_token_older_than_the_bound_is_a_bug_and_names_the_sample():
    """An engine that was not updated stamps an old version; the groups stay where they are."""
    buffer = Buffer(1, 1, 9, first_version=10)
    buffer.counts.version = 3
    await fill(buffer, group(0, 11, 13))
    with pytest.raises(RunError, match=r"sample policy/g0/t0\.b0@0 .*\(11, 13\).* version 13 with max_staleness 1 takes none before 12"):
        await buffer.take(60)
    assert len(buffer.ready) == 1 and buffer.counts.taken == 0


async def test_two_prompts_with_one_id_are_named():
    buffer = Buffer(2, 0, 1)
    await fill(buffer, group(3, 0, id="e0-a"), group(7, 0, id="e0-a"))
    with pytest.raises(DataError, match=r"group e0-a stands at two positions of the data, 3 and 7: two prompts have the same id"):
        await buffer.take(60)
