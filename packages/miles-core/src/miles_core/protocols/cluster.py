"""Clusters: where the ranks of a model run.

A rank is a process with an object of a worker class. Whoever starts ranks names the class (``module:Class``) and holds a ``Ranks``,
through which a method is called on all of them at a time. Arguments and results are plain values, NumPy arrays and objects of
importable classes: they go to another process, perhaps on another machine. Nothing else is shared, neither memory nor a disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Place:
    """What a rank is told before anything else: the first argument of its worker class.

    Attributes:
        rank: From 0.
        size: How many there are.
        local_rank: Index among the ranks on its machine, which is that of its device.
        rendezvous: Where all ranks of the group can meet: an ``init_method`` of torch.distributed, used by no other group.
        threads: What it is to compute with on a CPU.
    """

    rank: int
    size: int
    local_rank: int
    rendezvous: str
    threads: int


class Ranks(Protocol):
    """The ranks of one model. Calls wait for each other, also those that nobody waits for any more."""

    size: int
    """How many there are."""

    async def call(self, method: str, arguments: Sequence[tuple], *, seconds: float, what: str) -> list[Any]:
        """Run ``worker.method(*arguments[rank])`` on every rank at the same time.

        Args:
            method: Of the worker class.
            arguments: A tuple for each rank; only that rank gets it.
            seconds: Deadline for all of it, a call before this one included.
            what: What the caller waits for, for the error.

        Returns:
            What each rank returned.

        Raises:
            MilesError: Every rank raised one (a refusal that they agreed on): of the first one's class, with its sentence. The ranks
                go on.
            RunError: A rank raised something else or raised alone (its traceback is the cause), died, or was silent for ``seconds``.
                Names rank, method and log. All ranks are ended; later calls say so. A MilesError raised alone comes back as its own class.
        """
        ...

    def stream(self, method: str, arguments: Sequence[tuple], *, seconds: float, what: str) -> Iterator[Any]:
        """What the generator ``worker.method(*arguments[0])`` of rank 0 yields, one at a time; to be gone through in a thread.

        The other ranks go through theirs at the same time, and what they yield is dropped. No rank is more than a few items ahead of
        the caller. When the iterator is closed early, or another call comes, the ranks first go through the rest on their own.
        ``seconds`` is the deadline of each item. Raises as ``call`` does.
        """
        ...

    async def close(self) -> None:
        """End the ranks; their processes are gone afterwards. May be called twice."""
        ...


class Cluster(Protocol):
    """Starts ranks."""

    async def start(self, worker: str, size: int, arguments: Sequence[tuple], *, name: str, log_dir: Path, seconds: float) -> Ranks:
        """Start ranks and build ``worker(place, *arguments[rank])`` on each; returns when all are built.

        Args:
            worker: ``module:Class``. The module is imported with this process's ``sys.path``.
            size: Number of ranks.
            arguments: A tuple for each rank.
            name: For errors and logs.
            log_dir: Where what the ranks print goes, ``<name>-rank-<rank>.log``.
            seconds: Deadline for all of it.

        Raises:
            PluginError: There is no such class, or its module does not import.
            MilesError: As ``Ranks.call``.
        """
        ...

    async def close(self) -> None:
        """End whatever was started; no process is left. May be called twice."""
        ...
