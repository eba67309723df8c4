"""The producer fills the buffer: prompts in, complete, scored and filtered groups out, as many at once as admission allows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from .buffer import Buffer
from .cursor import Cursor
from .errors import DataError, InfrastructureFailure, MilesError, RunError
from .protocols import GroupFilter, Players, Prompt, Rollout, RolloutContext
from .refs import GroupRef
from .sample import Group, Sample, Status
from .scoring import Scorer
from .trace import Trace
from .waiting import call, deadline, in_daemon_thread


@dataclass
class Producer:
    """Starts groups while the buffer admits them.

    Attributes:
        buffer: Where groups go.
        cursor: Where prompts come from.
        rollout: From a prompt to samples.
        players: Who samples.
        scorer: Rewards.
        filters: Group filters by name.
        group_seconds: Deadline of one group.
        attempts: How often a group is issued when infrastructure fails.
        position: Next position in the data.
        trace: Gets every group as a task.
        reissue: Positions that were in flight at the cut this run resumed from; they go first.
    """

    buffer: Buffer
    cursor: Cursor
    rollout: Rollout
    players: Players
    scorer: Scorer
    filters: Mapping[str, GroupFilter]
    group_seconds: float
    attempts: int = 3
    position: int = 0
    reissue: list[int] = field(default_factory=list)
    on_group: Callable[[GroupRef | None], None] = lambda group: None
    trace: Trace = field(default_factory=lambda: Trace(None))
    _flying: dict[asyncio.Task, int] = field(default_factory=dict)
    _main: asyncio.Task | None = None
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __aenter__(self) -> Producer:
        self._main = asyncio.create_task(self._start_groups())
        return self

    async def __aexit__(self, *exception: object) -> None:
        tasks = [t for t in (self._main, *self._flying) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.reissue = self.in_flight()
        self._flying.clear()

    def in_flight(self) -> list[int]:
        """Positions of groups that were started and are neither ready nor dropped, failed ones too: a cut issues them again."""
        return sorted([*self._flying.values(), *self.reissue])

    async def _start_groups(self) -> None:
        while True:
            started = await self.buffer.admit()
            if self.reissue:
                position = self.reissue.pop(0)
            else:
                position, self.position = self.position, self.position + 1
            task = asyncio.create_task(self._group(position, started))
            self._flying[task] = position

    async def _group(self, position: int, started: int) -> None:
        """One group, from prompt to buffer. It is in flight until the very moment in which it is ready or dropped."""
        task = asyncio.current_task()
        assert task is not None
        try:
            prompt, epoch = await self._read(position), self.cursor.epoch(position)
            context = self.players.context(f"e{epoch}-{prompt.id}", epoch)
            what = f"group {context.group} (rollout and rewards)"
            with self.trace.task("group", context.group, position=position):
                group = await deadline(self._play(prompt, context), self.group_seconds, "the producer", what, "Raise deadlines.group.")
            reason = self._reason_to_drop(group)
            if reason is None:
                ref = GroupRef.of(group, position)
                await self.buffer.put(ref, started)
                del self._flying[task]
                self.on_group(ref)
            else:
                await self.buffer.drop(reason, started)
                del self._flying[task]
                self.on_group(None)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            await self.buffer.fail(error)

    async def _read(self, position: int) -> Prompt:
        """The prompt at a position, in a thread: it may have to come from a disk or a network. Sources are asked one thing at a time."""
        async with self._reading:
            reading, what = in_daemon_thread(self.cursor.prompt, position), f"the prompt at position {position}"
            return await deadline(reading, self.group_seconds, "the producer", what, "Raise deadlines.group.")

    async def _play(self, prompt: Prompt, context: RolloutContext) -> Group:
        for attempt in range(self.attempts):
            try:
                samples = await self._sample(prompt, replace(context, attempt=attempt))
                await self.scorer.score_group(samples)
                return Group(context.group, samples)
            except InfrastructureFailure as failure:  # of an engine, a world, or a service that scores
                last = failure
        raise RunError(f"group {context.group} failed {self.attempts} times, last: {last}") from last

    async def _sample(self, prompt: Prompt, context: RolloutContext) -> list[Sample]:
        try:
            samples = await call(self.rollout, prompt, context)
        except (MilesError, InfrastructureFailure):
            raise
        except Exception as error:
            raise RunError(f"rollout of group {context.group} failed: {type(error).__name__}: {error}") from error
        _check_ended(samples)
        if not samples:
            raise DataError(f"rollout of group {context.group} gave no samples; it gives at least one a trajectory")
        _check_ids(samples, context)
        for sample in samples:
            if sample.id.policy not in self.players.policies:
                raise DataError(f"sample {sample.id} belongs to no policy of this stage ({', '.join(self.players.policies)})")
            sample.validate(vocab_size=self.players.vocab_sizes.get(sample.id.policy), rl=sample.n_sampled > 0)
        return samples

    def _reason_to_drop(self, group: Group) -> str | None:
        wanted = getattr(getattr(self.rollout, "config", None), "group_size", 1)
        if wanted >= 2 and len(group.trajectories()) < 2:
            return "fewer than 2 trajectories"
        for name, keep in self.filters.items():
            reason = keep(group)
            if not isinstance(reason, str | None):
                raise DataError(
                    f"group filter {name!r} gave {reason!r} for group {group.id}; it gives None to keep it, or a reason as text"
                )
            if reason is not None:
                return f"{name}: {reason}"
        return None


def _check_ended(samples: list[Sample]) -> None:
    for sample in samples:
        if sample.status in (Status.FAILED, Status.ABORTED):
            raise InfrastructureFailure(f"sample {sample.id} is {sample.status}")


def _check_ids(samples: list[Sample], context: RolloutContext) -> None:
    """Statistics go by group and trajectory, so ids must tell samples apart."""
    seen = set()
    for sample in samples:
        id = sample.id
        if id.group != context.group:
            raise DataError(f"sample {id} was given for group {context.group}; a rollout names its samples' group context.group")
        if (which := (id.policy, id.trajectory, id.branch)) in seen:
            raise DataError(f"two samples are called {id}; give each trajectory of a group, and each branch of a trajectory, its number")
        seen.add(which)
