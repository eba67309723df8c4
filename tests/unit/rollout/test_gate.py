"""What stands between requests and an engine whose weights change."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest

from miles_core.errors import RunError
from miles_core.waiting import deadline
from miles_rollout.gate import Gate


class Engine:
    """Notes what the gate has it do."""

    def __init__(self) -> None:
        self.gate, self.done = Gate("toy"), list[str]()

    def closed(self) -> AbstractAsyncContextManager[None]:
        return self.gate.closed(self._hold, self._serve, self._give_up)

    async def _hold(self) -> None:
        self.done.append("hold")

    async def _serve(self, version: int | None) -> None:
        self.done.append(f"serve {version}")

    async def _give_up(self) -> None:
        self.done.append("give up")

    async def request(self) -> None:
        await self.gate.passed()
        self.done.append("request")


async def some_turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_requests_wait_for_the_end_of_the_outermost_block():
    engine = Engine()
    async with engine.closed():
        request = asyncio.create_task(engine.request())
        async with engine.closed():
            engine.gate.changing = 3
        await some_turns()
        assert engine.gate.is_closed and not request.done()
    await request
    assert engine.done == ["hold", "serve 3", "request"] and not engine.gate.is_closed


async def test_a_block_of_another_task_waits_for_its_turn():
    engine = Engine()

    async def another() -> None:
        await begun.wait()
        async with engine.closed():
            engine.gate.changing = 2

    begun = asyncio.Event()
    waiting = asyncio.create_task(another())
    async with engine.closed():
        begun.set()
        await some_turns()
        engine.gate.changing = 1
    await waiting
    assert engine.done == ["hold", "serve 1", "hold", "serve 2"]


async def test_parts_may_run_in_tasks_that_the_block_starts():
    """With a deadline, or several at a time. One that is not awaited is no part that could be served."""
    engine = Engine()

    async def part(number: int) -> None:
        async with engine.closed():
            engine.gate.changing = 7
            await asyncio.sleep(0 if number < 2 else 60)

    async with engine.closed():
        await deadline(part(0), 5, "the test", "the part")
        await asyncio.gather(part(0), part(1))
    assert engine.done == ["hold", "serve 7"]
    with pytest.raises(RunError, match="a part of the update of the toy engine's weights still runs"):
        async with engine.closed():
            left = asyncio.create_task(part(2))
            await some_turns()
    left.cancel()
    with pytest.raises(RunError, match="version 7"):
        await engine.request()
    after = asyncio.create_task(part(0))  # what outlives a block is a block of its own
    async with engine.closed():
        await some_turns()
        assert not after.done()
    await after


async def test_a_failure_before_anything_changed_costs_nothing():
    engine = Engine()
    with pytest.raises(RunError, match="too early"):
        async with engine.closed():
            raise RunError("too early")
    await engine.request()
    assert engine.done == ["hold", "give up", "request"]


@pytest.mark.parametrize("failure", [RunError("checksums differ"), asyncio.CancelledError("checksums differ")], ids=["error", "cancelled"])
async def test_a_failure_after_a_change_refuses_requests_until_a_block_succeeds(failure: BaseException):
    engine = Engine()
    with pytest.raises(type(failure)):
        async with engine.closed():
            request = asyncio.create_task(engine.request())
            engine.gate.changing = 4
            await some_turns()
            raise failure
    for refused in (request, engine.request()):
        with pytest.raises(RunError, match=r"the toy engine serves nothing: version 4 .* whole and verified \(checksums differ\)"):
            await refused
    async with engine.closed():  # in which nothing arrives
        pass
    with pytest.raises(RunError, match="version 4"):
        await engine.request()
    async with engine.closed():
        engine.gate.changing = 5
    await engine.request()


async def test_a_part_that_failed_is_not_forgotten():
    engine = Engine()
    with pytest.raises(RunError, match="a part of the update of the toy engine's weights failed: half of it"):
        async with engine.closed():
            with pytest.raises(RunError, match="half of it"):
                async with engine.closed():
                    engine.gate.changing = 6
                    raise RunError("half of it")
    with pytest.raises(RunError, match="version 6"):
        await engine.request()
    assert engine.done == ["hold", "give up"]


async def test_who_waits_hears_that_it_was_shut():
    engine = Engine()
    async with engine.closed():
        request = asyncio.create_task(engine.request())
        await some_turns()
        engine.gate.shut("it was closed")
        with pytest.raises(RunError, match="serves nothing: it was closed"):
            await request
        engine.gate.changing = 1
    with pytest.raises(RunError, match="it was closed"):
        await engine.request()
