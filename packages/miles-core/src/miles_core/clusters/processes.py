"""``cluster: processes``: ranks on this machine, forked from a process that imported the worker's module once.

Nothing is fixed that two runs could fight over: ranks are reached over socket pairs, and meet each other through a file in a directory of
their own. They end when this process does, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import RanksLost, RunError
from ..protocols import BuildContext
from ..waiting import in_daemon_thread
from . import ProcessesConfig
from .exchange import Exchange
from .fork_server import ForkServer


class Processes:
    """See ``Cluster``. One server process for each worker module, kept until ``close``."""

    def __init__(self, config: ProcessesConfig, context: BuildContext) -> None:
        self._threads = config.threads
        self._servers: dict[str, ForkServer] = {}
        self._groups: list[LocalRanks] = []
        self._lock = threading.Lock()

    async def start(self, worker: str, size: int, arguments: Sequence[tuple], *, name: str, log_dir: Path, seconds: float) -> LocalRanks:
        """See ``Cluster.start``."""
        group = LocalRanks(name, size, [log_dir.resolve() / f"{name}-rank-{rank}.log" for rank in range(size)])
        self._groups.append(group)
        try:
            await in_daemon_thread(self._start, group, worker, list(arguments), time.monotonic() + seconds, seconds)
        except BaseException:
            group.give_up()
            raise
        return group

    def _start(self, group: LocalRanks, worker: str, arguments: list[tuple], end: float, seconds: float) -> None:
        module = worker.partition(":")[0]
        group.logs[0].parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if group.given_up:  # and perhaps the cluster closed
                raise RunError(f"the start of {group.name} was given up")
            if group.ended is not None:  # the cluster closed while it was started: nobody would end another server
                raise RanksLost(f"{group.name} cannot be started: {group.ended}")
            server = self._servers.get(module)
            if server is None or not server.alive:
                server = self._servers[module] = ForkServer(module, group.logs[0].parent / f"{group.name}-import.log")
        server.load(module, end, seconds)
        group.launch(server, worker, arguments, self._threads or threads_of(group.size), end, seconds)

    async def close(self) -> None:
        """See ``Cluster.close``."""
        for group in self._groups:
            await group.close()
        await asyncio.to_thread(self._close_servers)
        self._groups = []

    def _close_servers(self) -> None:
        with self._lock:  # one that is just being started is waited for: nobody else would end it
            servers, self._servers = list(self._servers.values()), {}
        for server in servers:
            server.close()


def threads_of(ranks: int) -> int:
    """Threads for each of a model's ranks: as OMP_NUM_THREADS says, else a share of the cores that this process may use."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) else max(1, len(os.sched_getaffinity(0)) // ranks)


class LocalRanks:
    """See ``Ranks``.

    Attributes:
        name: For errors.
        size: Number of ranks.
        logs: What each rank prints.
    """

    def __init__(self, name: str, size: int, logs: list[Path]) -> None:
        self.name, self.size, self.logs = name, size, logs
        self.connections: list[socket.socket] = []
        self.server: ForkServer | None = None
        self.number = -1
        self._busy, self._ending = threading.Lock(), threading.Lock()
        self._open: Exchange | None = None  # a stream between two items
        self.ended: str | None = None
        self.given_up = False

    # ---- what a controller calls

    async def call(self, method: str, arguments: Sequence[tuple], *, seconds: float, what: str) -> list[Any]:
        """See ``Ranks.call``."""
        return await in_daemon_thread(self._call, "call", method, list(arguments), time.monotonic() + seconds, seconds, what)

    def stream(self, method: str, arguments: Sequence[tuple], *, seconds: float, what: str) -> Iterator[Any]:
        """See ``Ranks.stream``."""
        modes = ["stream", *["drop"] * (self.size - 1)]
        requests = [(mode, method, a) for mode, a in zip(modes, arguments, strict=True)]
        exchange = Exchange(self, method, 0.0, seconds, what)
        began = False
        try:
            while True:
                with self._in_turn(exchange, resumes=began):
                    if not began:
                        exchange.send(requests)
                        began = True
                    item = exchange.next_item()
                    if item is None:
                        exchange.finish()
                        return
                    exchange.answer("next")  # rank 0 makes one more while this one is used
                    self._open = exchange
                yield item[0]
        finally:
            if self._open is exchange and self.ended is None:
                with self._in_turn(exchange, resumes=True):
                    exchange.drain()

    async def close(self) -> None:
        """See ``Ranks.close``."""
        await asyncio.to_thread(self.end, f"the ranks of {self.name} were closed")

    # ---- what the cluster and exchanges call

    def launch(self, server: ForkServer, worker: str, arguments: list[tuple], threads: int, end: float, seconds: float) -> None:
        """Fork the ranks and build the worker on each."""
        self.server = server
        pairs = [socket.socketpair() for _ in range(self.size)]
        self.connections = [ours for ours, _ in pairs]
        self.number = server.fork([str(log) for log in self.logs], [theirs for _, theirs in pairs], threads, end, seconds)
        if self.given_up:
            self.end(f"the start of {self.name} was given up")
        self._call("build", worker, arguments, end, seconds, "the ranks to get ready")
        if self.given_up:
            self.end(f"the start of {self.name} was given up")

    def give_up(self) -> None:
        """The start failed or is not waited for any more: end what there is, now or as soon as there is something."""
        self.given_up = True
        if self.number >= 0:
            self.end(f"the start of {self.name} was given up")

    def end(self, why: str, dying: Sequence[int] = ()) -> list[int]:
        """End the processes; later calls say why. Returns their exit statuses, those of ``dying`` ranks as they ended by themselves."""
        with self._ending:
            if self.ended is not None:
                return []
            self.ended = why
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # the rank hears of it, and who waits for it here
        self._close_connections()
        return self.server.end(self.number, list(dying)) if self.server is not None and self.number >= 0 else []

    def _close_connections(self) -> None:
        """Close them, unless a call is using them: then it does so when it is done, lest it read what gets their numbers next."""
        if self._busy.acquire(blocking=False):
            try:
                for connection in self.connections:
                    connection.close()
            finally:
                self._busy.release()

    def _call(self, mode: str, method: str, arguments: list[tuple], end: float, seconds: float, what: str) -> list[Any]:
        exchange = Exchange(self, method, end, seconds, what)
        with self._in_turn(exchange, end):
            exchange.send([(mode, method, a) for a in arguments])
            return exchange.finish()

    @contextlib.contextmanager
    def _in_turn(self, exchange: Exchange, end: float | None = None, *, resumes: bool = False) -> Generator[None]:
        """Wait until no other exchange runs, and go through the rest of a stream that somebody left half way.

        Args:
            exchange: Whose turn it is to be.
            end: Its deadline; None: its ``seconds`` from now on.
            resumes: Whether it is such a stream itself.
        """
        exchange.end = time.monotonic() + exchange.seconds if end is None else end
        asked = f"{exchange.what} ({exchange.method})"
        self._check_there(asked)
        if not self._busy.acquire(timeout=max(exchange.end - time.monotonic(), 0)):
            raise RunError(f"{self.name} waited {exchange.seconds:g} s for {asked}: an earlier call to its ranks is not done yet")
        try:
            self._check_there(asked)
            left, self._open = self._open, None
            if resumes and left is not exchange:
                raise RunError(f"{self.name} cannot go on with {asked}: a later call took its place")
            if left is not None and left is not exchange:
                left.end = exchange.end
                left.drain()
            yield
        finally:
            self._busy.release()
            if self.ended is not None:
                self._close_connections()

    def _check_there(self, asked: str) -> None:
        if self.ended is not None:
            raise RanksLost(f"{self.name} cannot be asked for {asked}: its ranks were ended before. {self.ended}")
