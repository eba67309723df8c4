"""The buffer between rollout and training, and the one knob from sync to fully asynchronous: ``max_staleness``.

Kept by admission: a group is started only while ``started − dropped < (version + max_staleness + 1) × groups``. With 0 that is
exact alternation. With k > 0 at most ``groups`` groups that are neither trained nor dropped were started k or more versions ago;
the next step takes these first, and waits for those of them that are still in flight, so that no token that is trained is more
than k versions old. The same counts bound the work in flight.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from .errors import DataError, RunError
from .refs import GroupRef
from .waiting import deadline


@dataclass
class Counts:
    """Groups of a stage since it began; part of a cut. ``version`` counts the stage's publishes."""

    started: int = 0
    dropped: int = 0
    taken: int = 0
    version: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Dropped groups by reason."""


class Buffer:
    """Groups that are ready, and who may start the next one.

    Args:
        groups: Groups a step takes.
        max_staleness: In versions.
        steps: Steps of the stage; nothing is started that could not be trained.
        first_version: Weight version at the start of the stage.
    """

    def __init__(self, groups: int, max_staleness: int, steps: int, *, first_version: int = 0):
        self.groups, self.max_staleness, self.steps = groups, max_staleness, steps
        self.first_version = first_version
        self.counts = Counts()
        self.ready: list[GroupRef] = []
        self._in_flight: list[int] = []  # of each group that was started, the version at that time
        self._failure: BaseException | None = None
        self._changed = asyncio.Condition()

    async def admit(self) -> int:
        """Wait until one more group may start, and count it as started; ``put`` and ``drop`` want the version it gives."""
        async with self._changed:
            await self._changed.wait_for(self._may_start)
            self.counts.started += 1
            self._in_flight.append(self.counts.version)
            return self.counts.version

    def _may_start(self) -> bool:
        c = self.counts
        reach = min(c.version + self.max_staleness + 1, self.steps)
        return c.started - c.dropped < reach * self.groups

    async def put(self, group: GroupRef, started: int) -> None:
        """A group that was started at version ``started`` is complete and scored."""
        async with self._changed:
            self._in_flight.remove(started)
            self.ready.append(group)
            self._changed.notify_all()

    async def drop(self, reason: str, started: int) -> None:
        """A group that was started at version ``started`` is not trained on; another may start in its place.

        Raises:
            RunError: So many were dropped that the filters will never let a batch through.
        """
        async with self._changed:
            self._in_flight.remove(started)
            self._drop(1, reason)

    async def discard(self, groups: list[GroupRef], reason: str) -> None:
        """Groups that were taken are not trained on after all; others may start in their place. Raises as ``drop`` does."""
        async with self._changed:
            self.counts.taken -= len(groups)
            self._drop(len(groups), reason)

    def _drop(self, number: int, reason: str) -> None:
        c = self.counts
        c.dropped += number
        c.reasons[reason] = c.reasons.get(reason, 0) + number
        self._changed.notify_all()
        if c.dropped > 50 * self.groups and c.dropped > 20 * (c.taken + len(self.ready)):
            why = ", ".join(f"{r}: {n}" for r, n in sorted(c.reasons.items(), key=lambda item: -item[1]))
            raise RunError(f"{c.dropped} of {c.started} groups were dropped ({why}). Relax the filter or change the data.")

    async def fail(self, error: BaseException) -> None:
        """The producer cannot go on; whoever takes is told."""
        async with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    async def take(self, seconds: float) -> list[GroupRef]:
        """The next step's groups, in the order of the data.

        Raises:
            RunError: They were not complete within ``seconds``, or a token is older than ``max_staleness`` allows.
            DataError: Two of them have the same id.
        """
        if self._failure is not None or not self._may_take():  # else at once, so that training starts and rollout goes on beside it
            await deadline(
                self._wait_ready(),
                seconds,
                "the loop",
                lambda: f"{self.groups} groups ({len(self.ready)} were ready, {len(self._in_flight)} in flight)",
                "Raise deadlines.rollout, or look for a slow environment or reward.",
            )
        oldest_first = sorted(self.ready, key=_oldest)
        taken, left = oldest_first[: self.groups], oldest_first[self.groups :]
        taken.sort(key=lambda g: g.position)
        self._assert_fresh(taken)
        self._assert_distinct(taken)
        self.ready = left
        self.counts.taken += len(taken)
        return taken

    def put_back(self, groups: list[GroupRef]) -> None:
        """Groups that were taken and not trained on, because the step failed before."""
        self.ready = groups + self.ready
        self.counts.taken -= len(groups)

    async def _wait_ready(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or self._may_take())
        if self._failure is not None:
            raise self._failure

    def _may_take(self) -> bool:
        """Enough are ready, and none is in flight that would be too old a step later."""
        due = self.counts.version - self.max_staleness
        return len(self.ready) >= self.groups and all(started > due for started in self._in_flight)

    def _assert_fresh(self, groups: list[GroupRef]) -> None:
        now = self.first_version + self.counts.version
        for ref in (r for g in groups for r in g.refs if r.sampled):
            oldest_allowed = now - self.max_staleness
            if ref.versions[0] < oldest_allowed:
                raise RunError(
                    f"sample {ref.id} was sampled by versions {ref.versions}, but version {now} with max_staleness {self.max_staleness} "
                    f"takes none before {oldest_allowed}. This is a bug in admission or in an engine's version stamp."
                )

    def _assert_distinct(self, groups: list[GroupRef]) -> None:
        positions: dict[str, int] = {}
        for group in groups:
            if positions.setdefault(group.id, group.position) != group.position:
                raise DataError(
                    f"group {group.id} stands at two positions of the data, {positions[group.id]} and {group.position}: two prompts "
                    "have the same id. Give every prompt of the data source an id of its own."
                )

    async def published(self) -> None:
        """Engines have the next version; more groups may start."""
        async with self._changed:
            self.counts.version += 1
            self._changed.notify_all()


def _oldest(group: GroupRef) -> float:
    """The oldest version that sampled one of a group's tokens; infinity where none was sampled."""
    return min((r.versions[0] for r in group.refs if r.sampled), default=math.inf)
