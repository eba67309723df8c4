"""The loop (DESIGN §3): take groups, prepare, annotate, advantages, step, publish, record. The same from laptop to cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from . import cut
from .batch import Batch
from .buffer import Buffer
from .config import StageConfig
from .errors import RunError, StepRefused
from .hooks import Hooks
from .learner import Learner
from .observer import Observer
from .producer import Producer
from .protocols import Evaluator, Players, Tracker, Trainer, WeightTransport
from .refs import GroupRef, SampleRef
from .rollout_metrics import rollout_metrics
from .run_dir import RunDir
from .sample_io import save_samples
from .trace import Trace
from .waiting import deadline


@dataclass
class Loop:
    """One stage of a run, built and ready to go.

    Attributes:
        name: The stage's name.
        stage: Its configuration.
        run_dir: Where it writes.
        first_step: Steps of the run before this stage; a step's number in the run is also its weight version.
        players: Who samples.
        learners: One a policy that learns.
        trainers: By model name.
        transports: By policy name.
        buffer, producer: Rollout's side.
        evaluators: By name.
        trackers, hooks, observer: Who is told.
        config_hash: What ties a cut to the configuration.
        keep: Cuts that are kept.
        step: Steps of this stage that are done.
        trace: Gets every phase as a span.
    """

    name: str
    stage: StageConfig
    run_dir: RunDir
    first_step: int
    players: Players
    learners: Sequence[Learner]
    trainers: Mapping[str, Trainer]
    transports: Mapping[str, WeightTransport]
    buffer: Buffer
    producer: Producer
    evaluators: Mapping[str, Evaluator]
    trackers: Sequence[Tracker]
    hooks: Hooks
    observer: Observer
    config_hash: str
    keep: int
    step: int = 0
    stopping: bool = False
    """Set by ``request_stop``: the step in progress is finished and saved, then the stage ends."""
    saved_step: int = -1
    trace: Trace = field(default_factory=lambda: Trace(None))
    row: dict[str, float | int | str] = field(default_factory=dict)
    """Metrics of the step in progress."""
    owes_evaluation: bool = False
    """The step's evaluation was due and did not come to its end; a cut says so, and resume makes up for it."""
    _between_steps: bool = True

    @property
    def version(self) -> int:
        """Weight version that engines serve between steps; also the run's step number."""
        return self.first_step + self.step

    def learning(self) -> dict[str, Trainer]:
        """The trainers whose models are trained; the others never change."""
        return {n: t for n, t in self.trainers.items() if self.stage.models[n].learns}

    def request_stop(self) -> None:
        """Finish the step in progress, save, and end."""
        self.stopping = True

    async def run(self) -> None:
        """Go through the stage. On failure the last consistent state is saved before the error goes on.

        Raises:
            MilesError: A sentence for the user.
        """
        self.observer.stage(self.name, self.step, self.stage.steps)
        try:
            await self.hooks.fire("on_start", self)
            await self._publish()
            if self.step == 0 or self.owes_evaluation:
                await self._evaluate()
                self._log_evaluation()
            async with self.producer:
                while self.step < self.stage.steps and not self.stopping:
                    await self._one_step()
            await self._save()
            await self.hooks.fire("on_end", self)
        except BaseException as error:
            await self._rescue(error)
            raise

    async def _one_step(self) -> None:
        self.row = {"stage": self.name, "stage_step": self.step + 1}
        began = time.perf_counter()
        await self.hooks.fire("before_rollout", self)
        groups, batches = await self._taken()
        self._between_steps = False
        for learner in self.learners:
            learner.trained_something = False
        with self._phase("train"):
            for learner, batch in zip(self.learners, batches, strict=True):
                prefix = "" if len(self.learners) == 1 else f"{learner.policy}/"
                if not self._trains(learner, batch):
                    self.row |= {prefix + name: value for name, value in learner.metrics.items()} | {f"{prefix}optimizer_steps": 0}
                    continue
                try:
                    self.row |= {prefix + name: value for name, value in (await learner.step(batch, self.step)).items()}
                except StepRefused:
                    if not any(one.trained_something for one in self.learners):
                        self._between_steps = True
                        self.buffer.put_back(groups)  # as if the step had not begun: what was learned before it can be saved
                    raise
        self.step += 1
        self._between_steps = True
        every = self.stage.every
        self.owes_evaluation = self.step == self.stage.steps or bool(every.evaluate and self.step % every.evaluate == 0)
        try:
            if every.trajectories and self.step % every.trajectories == 0:
                with self._phase("save"):
                    self._write_trajectories(batches)
            await self.hooks.fire("after_step", self)
            with self._phase("publish"):
                await self._publish()
            await self.buffer.published()
            if self.owes_evaluation or self.stopping:
                await self._evaluate()
        finally:  # whatever fails after it, a step that was trained has its row: resume does not do it again
            self._log(batches, began)
        if every.checkpoint and self.step % every.checkpoint == 0 and self.step < self.stage.steps:
            await self._save()

    async def _taken(self) -> tuple[list[GroupRef], list[Batch]]:
        """The next groups that give something to train on, and what each learner is trained on in this step."""
        while True:
            with self._phase("rollout"):
                groups = await self.buffer.take(self.stage.deadlines.rollout)
            try:
                await self.hooks.fire("after_rollout", self)
                batches = [await self._batch(learner, groups) for learner in self.learners]
                if any(map(self._trains, self.learners, batches)):
                    await self.hooks.fire("before_step", self)
                    return groups, batches
            except BaseException:
                self.buffer.put_back(groups)  # nothing was trained: the cut taken now must not lose them
                raise
            self.observer.note(
                f"Step {self.version + 1}: filters, corrections or the rollout leave no token of its {len(groups)} groups to train on; "
                "others take their place."
            )
            await self.buffer.discard(groups, "no token of the whole batch is trained")  # refused now, and after every resume

    def _trains(self, learner: Learner, batch: Batch) -> bool:
        """Whether a learner takes a step on a batch: some token is trained, or it is for an ``@miles.update``, which may not care."""
        return bool(batch.segments.tokens) or self.stage.models[learner.policy].trainer.brings_weights

    async def _batch(self, learner: Learner, groups: list[GroupRef]) -> Batch:
        """What a learner is trained on in this step."""
        batch = learner.prepare(await self._scored(learner, groups), self.version)
        with self._phase("annotate"):
            batch = await learner.annotate(batch)
        return learner.advantages(batch)

    async def _scored(self, learner: Learner, groups: list[GroupRef]) -> list[SampleRef]:
        """The learner's samples; rewards of a whole batch are given here."""
        refs = [r for g in groups for r in g.refs if r.id.policy == learner.policy]
        if not refs:
            raise RunError(
                f"step {self.version + 1}: no sample belongs to policy {learner.policy!r}; the rollout names it in none of its ids"
            )
        scorer = self.producer.scorer
        if not scorer.has_batch_rewards:
            return refs
        samples = [r.get() for r in refs]
        await scorer.score_batch(samples)
        return [SampleRef.of(s) for s in samples]

    async def _publish(self) -> None:
        """Every policy's weights to its engines, verified; one version a publish."""
        for policy in self.players.policies:
            sinks = [engine for name, engine in self.players.engines.items() if name == policy]
            publishing = self.transports[policy].publish(self.trainers[policy], sinks, self.version)
            what = f"version {self.version} of {policy} to reach {len(sinks)} engines"
            metrics = await deadline(publishing, self.stage.deadlines.publish, "the loop", what)
            self.row |= {f"publish/{k}": v for k, v in metrics.items()}
        for trainer in self.trainers.values():
            trainer.version = self.version
        await self.hooks.fire("after_publish", self)

    def _log(self, batches: list[Batch], began: float) -> None:
        refs = [r for b in batches for r in b.refs]
        self.row |= rollout_metrics(refs) | {"dropped_groups": self.buffer.counts.dropped, "version": self.version}
        seconds = time.perf_counter() - began
        self.row |= {"seconds": seconds, "tokens_per_second": sum(r.sampled for r in refs) / seconds}
        for tracker in self.trackers:
            tracker.log(self.version, self.row)
        self.observer.step({"step": self.version, **self.row})

    def _write_trajectories(self, batches: list[Batch]) -> None:
        samples = []
        for learner, packed in zip(self.learners, batches, strict=True):
            batch = packed.with_columns(learner.seen)
            for name in [n for n in batch.columns if n not in ("versions", "logprobs")]:  # the loss mask is what filters left of it
                for ref, column in zip(batch.refs, batch.unpack(name), strict=True):
                    ref.get().columns[name] = column
            samples += [r.get() for r in batch.refs]
        save_samples(self.run_dir.trajectories / f"step-{self.version:06d}.safetensors", samples)

    async def _evaluate(self) -> None:
        for name, evaluator in self.evaluators.items():
            with self._phase("evaluate"):
                found = await deadline(evaluator.evaluate(self.players), self.stage.deadlines.evaluate, "the loop", f"evaluator {name}")
            self.row |= {f"eval/{name}/{k}": float(v) for k, v in found.metrics.items()}
            if found.samples:
                save_samples(self.run_dir.trajectories / f"eval-{self.name}.{name}-{self.version:06d}.safetensors", found.samples)
        self.owes_evaluation = False

    def _log_evaluation(self) -> None:
        """A row of its own for an evaluation that is no step's: before the first, or owed by an earlier life."""
        if self.evaluators:
            row = {"stage": self.name, "stage_step": self.step, "version": self.version} | self.row
            for tracker in self.trackers:
                tracker.log(self.version, row)
            self.observer.step({"step": self.version, **row})

    async def _save(self) -> None:
        """Take a cut; see ``cut``."""
        if self.saved_step == self.step:
            return
        with self._phase("save"), cut.begin(self.run_dir.checkpoints, self.version) as partial:
            for name, trainer in self.learning().items():
                directory = partial / "models" / name
                directory.mkdir(parents=True)
                await trainer.save(directory)
            in_flight = self.producer.in_flight()
            counts = asdict(self.buffer.counts)
            counts["started"] = counts["taken"] + counts["dropped"] + len(self.buffer.ready)
            counts["version"] = self.step  # resume publishes it, whether this life came to that or not
            ready = list(self.buffer.ready)
            state = cut.CutState(
                stage=self.name,
                step=self.step,
                global_step=self.version,
                position=self.producer.position,
                in_flight=in_flight,
                counts=counts,
                ready=[(g.id, g.position, len(g.refs)) for g in ready],
                config_hash=self.config_hash,
                owes_evaluation=self.owes_evaluation,
            )
            final = await asyncio.to_thread(cut.commit, partial, state, ready)
        self.saved_step = self.step
        try:
            await asyncio.to_thread(cut.prune, final, self.keep)
        except OSError as error:  # the new cut is there all the same
            self.observer.note(f"An old cut could not be removed: {error}")
        await self.hooks.fire("after_checkpoint", self)

    async def _rescue(self, error: BaseException) -> None:
        """Save the last consistent state if there is one that is not on disk, say so on the error, and tell the hooks."""
        what = "What was learned"
        if self.step > max(self.saved_step, 0):  # there is something to save
            what += " until the last good cut"
            if self._between_steps and not isinstance(error, cut.CutNotWritten | asyncio.CancelledError):  # cancelled: at once
                try:
                    await self._save()
                    what = "What was learned"
                except Exception as second:
                    error.add_note(f"The state after step {self.version} could not be saved either: {second}")
        if self.saved_step >= 0 or any(self.run_dir.checkpoints.glob("step-*/manifest.json")):
            error.add_note(f"{what} is saved. Go on with: miles resume {self.run_dir.path}")
        if isinstance(error, Exception):
            try:
                await self.hooks.fire("on_failure", self)
            except Exception as second:
                error.add_note(f"on_failure of a hook failed too: {type(second).__name__}: {second}")

    @contextmanager
    def _phase(self, name: str) -> Generator[None]:
        self.observer.phase(name)
        began = time.perf_counter()
        with self.trace.span(name, step=self.version):
            yield
        self.row[f"time/{name}"] = float(self.row.get(f"time/{name}", 0.0)) + time.perf_counter() - began
