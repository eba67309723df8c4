"""A plain function of many arguments, called in threads: by one thread while that is quick, by many where calls are slow."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from .errors import RunError
from .waiting import in_daemon_thread

A = TypeVar("A")
T = TypeVar("T")

QUICK = 0.02
"""Seconds that one thread has for all calls before others help. Handing a call to a thread costs more than most rewards."""


async def call_each(
    function: Callable[[A], T], arguments: Sequence[A], slots: asyncio.Semaphore, seconds: float, late: Callable[[A], str]
) -> list[T]:
    """What a plain function gives for each argument, in their order. The first failure ends it and is raised as it is.

    Args:
        function: User code, which may be slow or hang.
        arguments: Of one call each.
        slots: Each thread takes one.
        seconds: Deadline of one call, from its begin; infinity for none.
        late: What to say of an argument whose call takes longer.

    Raises:
        RunError: A call took longer than ``seconds``.
    """
    calls = _Calls(function, arguments)

    async def thread() -> None:
        async with slots:
            await in_daemon_thread(calls.work)

    threads = [asyncio.ensure_future(thread())] if arguments else []
    timeout: float | None = QUICK
    try:
        while running := [task for task in threads if not task.done()]:
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if (overdue := calls.overdue(seconds)) is not None:
                raise RunError(late(overdue))
            threads += [asyncio.ensure_future(thread()) for _ in range(calls.unfinished - len(running))]
            timeout = calls.until_overdue(seconds)
    finally:
        calls.todo.clear()
        for task in threads:
            task.cancel()
        await asyncio.gather(*threads, return_exceptions=True)
    return calls.results()


class _Calls(Generic[A, T]):
    """Calls that wait, run and are done. ``todo``: indices of those that wait; its ``popleft`` is atomic."""

    def __init__(self, function: Callable[[A], T], arguments: Sequence[A]) -> None:
        self._function, self._arguments = function, arguments
        self._given: dict[int, T] = {}
        self._began: dict[int, float] = {}  # of calls that run
        self.todo = deque(range(len(arguments)))

    def work(self) -> None:
        """In a thread: make calls until none waits."""
        while True:
            try:
                index = self.todo.popleft()
            except IndexError:
                return
            self._began[index] = time.monotonic()
            self._given[index] = self._function(self._arguments[index])
            del self._began[index]

    @property
    def unfinished(self) -> int:
        """Calls that wait or run."""
        return len(self._arguments) - len(self._given)

    def overdue(self, seconds: float) -> A | None:
        """The argument of a call that has been running for longer than this."""
        now = time.monotonic()
        return next((self._arguments[index] for index, began in list(self._began.items()) if now - began >= seconds), None)

    def until_overdue(self, seconds: float) -> float | None:
        """Seconds until the first of the calls that run, or one that begins now, can be overdue; None for never."""
        now = time.monotonic()
        return None if math.isinf(seconds) else max(0.0, seconds - (now - min(self._began.values(), default=now)))

    def results(self) -> list[T]:
        return [self._given[index] for index in range(len(self._arguments))]
