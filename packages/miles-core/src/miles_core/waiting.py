"""Every wait has a deadline, and its error says who waited for what and how long."""

from __future__ import annotations

import asyncio
import collections
import inspect
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from .errors import RunError

T = TypeVar("T")

GRACE = 1.0
"""Seconds for what was cancelled to give up what it holds; what takes longer is left behind."""


async def deadline(awaitable: Awaitable[T], seconds: float, who: str, what: str | Callable[[], str], advice: str = "") -> T:
    """Await with a time limit. What is waited for is cancelled at the limit, or when the waiting itself is cancelled.

    Raises:
        RunError: "<who> waited <seconds> s for <what>." and the advice. ``what`` may be a function: what is so at the limit.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=GRACE)
        if task.done() and not task.cancelled():
            task.exception()  # looked at, lest asyncio complain where nobody waits any more
    if not done:
        raise RunError(f"{who} waited {seconds:g} s for {what if isinstance(what, str) else what()}. {advice}".rstrip())
    return task.result()


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run together; the first failure cancels the others and is raised as it is (not wrapped in a group)."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call user code: a coroutine function here, a plain one in a thread of its own."""
    return await (function(*arguments) if is_async(function) else in_daemon_thread(function, *arguments))


def is_async(function: Any) -> bool:
    """Whether a function, a partial of one or an object with ``__call__`` is a coroutine function."""
    function = getattr(function, "func", function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def in_daemon_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Run user code that may never return: unlike a pool's, these threads cannot keep the process from ending.

    One that is done serves the next call; a call never waits for another.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # ty: ignore[invalid-argument-type]

    def work() -> None:
        try:
            outcome = function(*arguments), None
        except (StopIteration, SystemExit) as error:  # a future cannot hold the one; the other would end the event loop
            outcome = None, RuntimeError(f"{type(error).__name__}: {error}")
        except BaseException as error:
            outcome = None, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    try:
        thread = _idle.pop()
    except IndexError:
        thread = _DaemonThread()
    thread.work.put(work)
    return await future


class _DaemonThread(threading.Thread):
    """Does one piece of work after another, and is in ``_idle`` between them. Starting a thread costs more than most rewards."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="miles-call")
        self.work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            self.work.get()()
            _idle.append(self)


_idle: collections.deque[_DaemonThread] = collections.deque()
"""Threads without work. Its ``pop`` and ``append`` are atomic."""
os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads
