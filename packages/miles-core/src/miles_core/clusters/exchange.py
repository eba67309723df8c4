"""One call to all ranks of a group: requests out, answers in, and a sentence when they do not come."""

from __future__ import annotations

import selectors
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

from .. import errors
from ..errors import MilesError, RanksLost
from . import wire
from .rank import START_OF_LOG, Failure

if TYPE_CHECKING:
    from .processes import LocalRanks

GRACE = 5.0
"""Seconds for the other ranks to answer too, once one has failed."""
TAIL = 15
"""Lines of a log that an error shows."""


class RankTraceback(Exception):
    """The cause of an error that a rank raised: its traceback as text."""


class Exchange:
    """One call: requests to all ranks, then what they answer, until all have answered or one has failed."""

    def __init__(self, ranks: LocalRanks, method: str, end: float, seconds: float, what: str) -> None:
        self.ranks, self.method, self.end, self.seconds, self.what = ranks, method, end, seconds, what
        self.results: dict[int, Any] = {}
        self.failures: dict[int, Failure | None] = {}  # None: it died
        self._of = {connection: rank for rank, connection in enumerate(ranks.connections)}

    def send(self, requests: list[tuple]) -> None:
        """Give every rank its request. One that cannot be encoded is raised as it is: no rank has got anything then."""
        assert len(requests) == self.ranks.size, f"{len(requests)} arguments for {self.ranks.size} ranks"
        for connection, parts in zip(self._of, [wire.encode(r) for r in requests], strict=True):
            try:
                wire.send(connection, parts, self.end)
            except OSError:
                self.failures[self._of[connection]] = None
            except wire.Silence:
                self._silent()
        if self.failures:
            self._failed()

    def finish(self) -> list[Any]:
        """What each rank returned."""
        while len(self.results) < self.ranks.size:
            self._wait()
        return [self.results[rank] for rank in range(self.ranks.size)]

    def next_item(self) -> tuple[Any] | None:
        """The next item of rank 0, None at its end."""
        while 0 not in self.results:
            if item := self._wait():
                return item
        return None

    def drain(self) -> None:
        """Let the ranks go through the rest of a stream: they are in the middle of something collective."""
        while self.next_item() is not None:
            self.answer("drop")
        self.finish()

    def answer(self, word: str) -> None:
        """Tell rank 0 whether another item is wanted."""
        try:
            wire.send(self.ranks.connections[0], wire.encode(word), self.end)
        except OSError:
            self.failures[0] = None
            self._failed()

    def _wait(self) -> tuple[Any] | None:
        """Take in what some ranks have answered; an item if there is one."""
        item = None
        ready = self._ready(self.end)
        if not ready:
            self._silent()
        for connection in ready:
            item = self._take(connection, self.end) or item
        if self.failures:
            self._failed()
        return item

    def _ready(self, end: float) -> list[socket.socket]:
        """Connections of ranks that have something to say; waits for one until ``end``."""
        self._check_there()
        with selectors.DefaultSelector() as selector:
            for connection, rank in self._of.items():
                if rank not in self.results and rank not in self.failures:
                    selector.register(connection, selectors.EVENT_READ)
            return [key.fileobj for key, _ in selector.select(max(end - time.monotonic(), 0))]  # ty: ignore[invalid-explicit-return]

    def _check_there(self) -> None:
        """Ranks that were ended answer nothing any more, whatever that looks like from here."""
        if self.ranks.ended is not None:
            raise RanksLost(f"{self.ranks.name} waited for {self.what} ({self.method}) when its ranks were ended. {self.ranks.ended}")

    def _take(self, connection: socket.socket, end: float) -> tuple[Any] | None:
        rank = self._of[connection]
        try:
            kind, value = wire.receive(connection, end)
        except EOFError:
            self.failures[rank] = None
            return None
        except wire.Silence:
            self._silent()
        if kind == "item":
            return (value,)
        (self.results if kind == "done" else self.failures)[rank] = value
        return None

    def _failed(self) -> None:
        """A rank failed: see what becomes of the others, then raise."""
        self._check_there()
        end = min(self.end, time.monotonic() + GRACE)
        while len(self.results) + len(self.failures) < self.ranks.size and (ready := self._ready(end)):
            for connection in ready:
                self._take(connection, end)
        if len(self.failures) == self.ranks.size and all(f is not None and f.kind for f in self.failures.values()):
            rank, failure = next(iter(self.failures.items()))
            assert failure is not None
            raise _refusal(failure, failure.sentence) from RankTraceback(f"rank {rank}:\n{failure.traceback}")
        dead = [rank for rank, failure in self.failures.items() if failure is None]
        # A rank that died is why the others failed; so is one with a sentence of its own. Else the first.
        rank = min(self.failures, key=lambda r: (r not in dead, not (f := self.failures[r]) or not f.kind))
        failure = self.failures[rank]
        where = f"rank {rank} of {self.ranks.size} of {self.ranks.name}"
        if failure is None:
            statuses = self.ranks.end(f"Rank {rank} died in {self.method}.", dead)
            sentence = f"{where} died in {self.method}{_status(statuses, rank)}. {self._tail(rank)}"
            raise RanksLost(sentence)
        self.ranks.end(f"Rank {rank} failed in {self.method}: {failure.sentence}")
        cause = RankTraceback(f"rank {rank}:\n{failure.traceback}")
        if failure.kind:
            raise _refusal(failure, f"{where}: {failure.sentence}") from cause
        raise RanksLost(f"{where} failed in {self.method}: {failure.sentence}. Its log is {self.ranks.logs[rank]}") from cause

    def _silent(self) -> None:
        """Nothing came in time: get the stacks, end the ranks, raise."""
        silent = [r for r in range(self.ranks.size) if r not in self.results and r not in self.failures]
        named = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))} of {self.ranks.size} of {self.ranks.name}"
        if self.ranks.server is not None:
            self.ranks.server.dump(self.ranks.number, silent)
        self.ranks.end(f"{named} did not answer {self.method} within {self.seconds:g} s.")
        tails = " ".join(self._tail(r) for r in silent)
        raise RanksLost(f"the run waited {self.seconds:g} s for {self.what}: {named} did not answer {self.method}. {tails}")

    def _tail(self, rank: int) -> str:
        """Where a rank's log is, and its end."""
        log = self.ranks.logs[rank]
        try:
            lines = log.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"Its log cannot be read: {error}."
        begin = max((i for i, line in enumerate(lines) if line.startswith(START_OF_LOG)), default=-1) + 1
        tail = "".join(f"\n  {line}" for line in lines[begin:][-TAIL:])
        return f"Its log, {log}, ends with:{tail}" if tail else f"It printed nothing; its log is {log}."


def _refusal(failure: Failure, sentence: str) -> MilesError:
    return getattr(errors, str(failure.kind))(sentence)


def _status(statuses: list[int], rank: int) -> str:
    if not statuses:
        return ""
    code = statuses[rank]
    return f" (signal {signal.Signals(-code).name})" if code < 0 else f" (exit status {code})"
