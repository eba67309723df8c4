"""What stands between requests and an engine whose weights change: closed until new ones have arrived and were found right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from miles_core.errors import RunError


@dataclass(eq=False)
class _Block:
    """One that runs: how many parts of it do, and why one failed."""

    parts: int = 0
    broken: str | None = None


class Gate:
    """Requests wait while a block of ``closed`` runs, and are refused from the failure of one in which weights changed.

    Attributes:
        unusable: Why the engine serves nothing; None where it may serve.
        changing: Version of the weights that have begun to arrive in the block that runs; None while all is as it was.
    """

    def __init__(self, engine: str, unusable: str | None = None) -> None:
        """Open, or with the reason why nothing is served; ``engine`` is a name for messages."""
        self._engine, self.unusable = engine, unusable
        self.changing: int | None = None
        self._block: _Block | None = None
        self._within: ContextVar[_Block | None] = ContextVar(f"block of engine {engine}", default=None)  # which a task is of
        self._turn, self._open = asyncio.Lock(), asyncio.Event()
        self._shut = False

    @property
    def is_closed(self) -> bool:
        """Whether requests have to wait."""
        return self._block is not None

    async def passed(self) -> None:
        """Wait while it is closed. Raises RunError when the engine serves nothing."""
        while self.is_closed and not self._shut:  # the next block may have begun by the time this one's end is heard of
            await self._open.wait()
        self.require_usable()

    def require_usable(self) -> None:
        """Raises RunError when the engine serves nothing."""
        if self.unusable is not None:
            raise RunError(f"the {self._engine} engine serves nothing: {self.unusable}")

    def shut(self, why: str) -> None:
        """For good; who waits is told why."""
        self._shut, self.unusable = True, why
        self._open.set()

    @staticmethod
    def _said(error: BaseException) -> str:
        return str(error) or type(error).__name__

    @asynccontextmanager
    async def closed(
        self,
        hold: Callable[[], Awaitable[None]],
        serve: Callable[[int | None], Awaitable[None]],
        give_up: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[None]:
        """Closed while the block runs. A block within another, in its task or one that it started, is a part of it, without which it
        fails; any other waits for its end.

        Args:
            hold: At the begin: until nothing is sampled any more.
            serve: At a good end: stamps the version that arrived, None where none did, and lets the engine go on.
            give_up: After a failure: what lets a later block find the engine as this one did.
        """
        block = self._within.get()
        if block is not None and block is self._block:
            block.parts += 1
            try:
                yield
            except BaseException as error:
                block.broken = block.broken or self._said(error)
                raise
            finally:
                block.parts -= 1
            return
        async with self._turn:
            self._block = block = _Block()
            self._within.set(block)
            self._open, self.changing = asyncio.Event(), None
            try:
                await hold()
                yield
                if block.parts:
                    raise RunError(f"a part of the update of the {self._engine} engine's weights still runs; await it within the block")
                if self.changing is not None and block.broken is not None:
                    raise RunError(f"a part of the update of the {self._engine} engine's weights failed: {block.broken}")
                await serve(self.changing)
                if self.changing is not None and not self._shut:
                    self.unusable = None
            except BaseException as error:
                if self.changing is not None and not self._shut:
                    self.unusable = f"version {self.changing} of its weights did not arrive whole and verified ({self._said(error)})"
                if give_up is not None:
                    await give_up()
                raise
            finally:
                self._block = None
                self._open.set()
