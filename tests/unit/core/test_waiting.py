"""Every wait ends: with its result, its own error, or a sentence; and it leaves nothing running behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from miles_core.errors import RunError
from miles_core.waiting import deadline, gather, in_daemon_thread


def others():
    return {t for t in asyncio.all_tasks() if t is not asyncio.current_task()}


async def forever(log=None):
    try:
        await asyncio.Event().wait()
    finally:
        if log is not None:
            log.append("gave up")


# ---- deadline ------------------------------------------------------------------------------------------------------------


async def test_a_result_and_an_error_come_through_as_they_are():
    async def fails():
        raise KeyError("mine")

    assert await deadline(asyncio.sleep(0, 7), 5, "I", "it") == 7
    with pytest.raises(KeyError, match="mine"):
        await deadline(fails(), 5, "I", "it")


async def test_past_the_limit_it_says_who_waited_for_what_and_cancels_it():
    log = []
    with pytest.raises(RunError, match=r"^the loop waited 0\.02 s for an engine\. Look at its log\.$"):
        await deadline(forever(log), 0.02, "the loop", "an engine", "Look at its log.")
    assert log == ["gave up"] and not others()


async def test_what_it_says_is_so_at_the_limit_not_before():
    state = ["0 of 4"]
    asyncio.get_running_loop().call_later(0.01, state.__setitem__, 0, "3 of 4")
    with pytest.raises(RunError, match="for 3 of 4"):
        await deadline(forever(), 0.05, "I", lambda: state[0])


async def test_cancelling_the_wait_cancels_what_is_waited_for():
    log = []
    waiting = asyncio.ensure_future(deadline(forever(log), 60, "I", "it"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert log == ["gave up"] and not others()


async def test_what_does_not_want_to_be_cancelled_is_left_behind(monkeypatch):
    monkeypatch.setattr("miles_core.waiting.GRACE", 0.02)
    release = asyncio.Event()

    async def stubborn():
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    left_behind = asyncio.ensure_future(stubborn())
    with pytest.raises(RunError, match="waited"):
        await deadline(left_behind, 0.02, "I", "it")
    assert not left_behind.done()
    release.set()
    await left_behind


# ---- gather --------------------------------------------------------------------------------------------------------------


async def test_results_keep_their_order():
    assert await gather(asyncio.sleep(0.001 * (3 - i), i) for i in range(3)) == [0, 1, 2]


async def test_the_first_failure_cancels_the_others_and_is_not_wrapped():
    log = []

    async def fails():
        await asyncio.sleep(0)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await gather([forever(log), fails(), forever(log)])
    assert log == ["gave up", "gave up"] and not others()


async def test_cancelling_a_gather_cancels_all_of_it():
    log = []
    gathering = asyncio.ensure_future(gather([forever(log), forever(log)]))
    await asyncio.sleep(0.001)
    gathering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gathering
    assert log == ["gave up", "gave up"] and not others()


# ---- threads -------------------------------------------------------------------------------------------------------------


async def test_a_function_runs_beside_the_event_loop():
    there = threading.Event()
    asyncio.get_running_loop().call_later(0.001, there.set)  # only an event loop that is free can set it
    assert await in_daemon_thread(there.wait, 60) is True


@pytest.mark.parametrize(
    ("error", "expected"), [(ZeroDivisionError, ZeroDivisionError), (StopIteration, RuntimeError), (SystemExit, RuntimeError)]
)
async def test_what_it_raises_comes_back(error, expected):
    def raises():
        raise error("mine")

    with pytest.raises(expected, match="mine"):
        await asyncio.wait_for(in_daemon_thread(raises), 60)


async def test_an_answer_that_nobody_waits_for_any_more_is_dropped():
    there = threading.Event()
    with pytest.raises(RunError, match="waited"):
        await deadline(in_daemon_thread(there.wait, 5), 0.02, "I", "it")
    there.set()
    await asyncio.sleep(0.02)


def test_a_function_that_never_returns_does_not_keep_the_process():
    code = """
import asyncio, time
from miles_core.errors import RunError
from miles_core.waiting import deadline, in_daemon_thread
async def main():
    try:
        await deadline(in_daemon_thread(time.sleep, 600), 0.05, "the reward", "its function")
    except RunError as error:
        print(error)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the reward waited 0.05 s for its function.\n"
