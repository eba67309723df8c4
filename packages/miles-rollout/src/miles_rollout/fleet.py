"""Several servers of one policy: each request goes to the one with the fewest outstanding; those that died are left out."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from miles_core.errors import RunError


class Named(Protocol):
    """What a fleet needs of a server."""

    @property
    def name(self) -> str: ...


S = TypeVar("S", bound=Named)


class Fleet(Generic[S]):
    """Who of the servers takes the next request. Names are unique; used in one event loop."""

    def __init__(self, servers: Sequence[S]) -> None:
        self._servers = list(servers)
        self._outstanding = {server.name: 0 for server in servers}
        self._lost: dict[str, str] = {}

    @property
    def living(self) -> list[S]:
        """Those that are not lost, in order."""
        return [server for server in self._servers if server.name not in self._lost]

    @property
    def outstanding(self) -> dict[str, int]:
        """Requests that each server, living or not, is busy with, by name."""
        return dict(self._outstanding)

    @contextmanager
    def lease(self) -> Generator[S]:
        """The living server with the fewest requests, at a tie the first; it counts one more until the end of the block.

        Raises:
            RunError: None is left; says what each of them died of.
        """
        living = self.require_living()
        server = min(living, key=lambda s: self._outstanding[s.name])
        self._outstanding[server.name] += 1
        try:
            yield server
        finally:
            self._outstanding[server.name] -= 1

    def lose(self, server: S, why: str) -> None:
        """No request goes there any more; what is said first of a server stays."""
        self._lost.setdefault(server.name, why)

    def require_living(self) -> list[S]:
        """``living``; raises RunError where that is empty."""
        living = self.living
        if not living:
            reasons = "\n".join(f"- {why}" for why in self._lost.values())
            raise RunError(f"no server is left of {len(self._servers)}:\n{reasons}")
        return living
