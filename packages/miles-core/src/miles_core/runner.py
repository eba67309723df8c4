"""A run from its configuration to its end: stages one after another, each from the weights of the one before."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cut, disk, memory
from .assembly import Origin, assemble, close, start
from .check import check, missing
from .config import RunConfig
from .errors import ConfigError, RunError
from .hooks import Hooks
from .loop import Loop
from .lora import holds_model
from .observer import Observer
from .protocols import BuildContext, Cluster, Tracker, Trainer
from .run_dir import RunDir
from .trackers import JsonlTracker


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_dir: Its directory.
        steps: Steps that were trained, over all its lives.
        finished: Whether all stages are done; False after a stop by request.
    """

    run_dir: Path
    steps: int
    finished: bool


class Run:
    """One run; ``request_stop`` (Ctrl-C) finishes the step in progress, saves and ends.

    Args:
        config: Resolved configuration.
        observer: Who watches.
    """

    def __init__(self, config: RunConfig, observer: Observer | None = None):
        check(config)
        if lacking := missing(config):
            raise ConfigError("\n".join(lacking))
        self.config = config
        self.observer = observer or Observer()
        self._loop: Loop | None = None
        self._stopping = False

    def request_stop(self) -> None:
        """End after the step in progress."""
        self._stopping = True
        if self._loop is not None:
            self._loop.request_stop()

    async def start(self) -> Outcome:
        """A new run in a new directory. Raises MilesError; what was learned until then is saved."""
        run_dir = RunDir.create(self.config.runs_dir, self.config.name)
        with disk.sentences(run_dir.path), memory.sentences(), run_dir.writing():
            run_dir.write_config(self.config.to_yaml())
            self.observer.note(f"The run's directory: {run_dir.path}")
            first = next(iter(self.config.stages))
            return await self._stages(run_dir, Origin(first, 0))

    async def resume(self, run_dir: RunDir) -> Outcome:
        """Go on from the newest complete cut; from the beginning if the run ended before it came to one.

        Raises:
            CheckpointError: Every cut is damaged, or belongs to another configuration or version of Miles.
            RunError: Nothing is left to do, or another process writes to this run.
        """
        with disk.sentences(run_dir.path), memory.sentences(), run_dir.writing():
            return await self._stages(run_dir, self._origin(run_dir))

    def _origin(self, run_dir: RunDir) -> Origin:
        """Where a run goes on. What its earlier life left beyond that becomes void."""
        run_dir.check_format()
        run_dir.clear_unfinished()
        names = list(self.config.stages)
        origin, version, done = Origin(names[0], 0), 0, {}
        if cut.any_finished(run_dir.checkpoints):
            directory, state, passed_over = cut.newest(run_dir.checkpoints, self.config.fingerprint())
            for sentence in passed_over:
                self.observer.note(sentence)
            if state.stage == names[-1] and state.step >= self.config.stages[state.stage].steps and (run_dir.models / "final").is_dir():
                raise RunError(f"{run_dir.path} is finished ({state.global_step} steps); there is nothing left to resume")
            origin, version = Origin(state.stage, state.global_step - state.step, directory, state), state.global_step
            done = {n: self.config.stages[n].steps for n in names[: names.index(state.stage)]} | {state.stage: state.step}
        last = run_dir.make_void(done, version)
        again = f" Steps {version + 1} to {last} were not saved; they are done again." if last > version else ""
        self.observer.note((f"Going on after step {version}." if version else "No step was saved; beginning anew.") + again)
        return origin

    async def _stages(self, run_dir: RunDir, origin: Origin) -> Outcome:
        context = BuildContext(run_dir.path, self.config.name, self.config.seed)
        hooks = Hooks({n: h.build(context) for n, h in self.config.hooks.items()})
        trackers: list[Tracker] = [JsonlTracker(run_dir.metrics)]
        cluster: Cluster = self.config.cluster.build(context)
        try:
            trackers += [t.build(context) for t in self.config.trackers.values()]
            names = list(self.config.stages)
            for name in names[names.index(origin.stage) :]:
                if name != origin.stage:
                    origin = Origin(name, origin.first_step + self.config.stages[origin.stage].steps)
                following = dict(zip(names, [*names[1:], "final"], strict=True))[name]
                done = await self._stage(run_dir, origin, trackers, hooks, cluster, following)
                if done < self.config.stages[name].steps:
                    return Outcome(run_dir.path, origin.first_step + done, finished=False)
            return Outcome(run_dir.path, origin.first_step + done, finished=True)
        finally:
            await cluster.close()
            for tracker in trackers:
                tracker.close()

    async def _stage(self, run_dir: RunDir, origin: Origin, trackers: list[Tracker], hooks: Hooks, cluster: Cluster, following: str) -> int:
        """Steps that are done of the stage; its weights are exported for the one that follows."""
        self._loop = await assemble(self.config, run_dir, origin, trackers, hooks, self.observer, cluster)
        if self._stopping:
            self._loop.request_stop()
        try:
            await start(self._loop, origin)
            # What stays until the stage ends is half a million objects: looking through them again and again costs 5 % of a run. What is
            # in a cycle and dead already, such as the models of the stage before, must not stay with them.
            gc.collect()
            gc.freeze()
            await self._loop.run()
            if self._loop.step == self._loop.stage.steps:
                idle = [d for d in run_dir.models.glob(f"{origin.stage}/*") if d.name not in self._loop.learning() and holds_model(d)]
                await export(self._loop.learning(), run_dir.models / following, idle)
            return self._loop.step
        finally:
            gc.unfreeze()
            await close(self._loop)


async def export(trainers: Mapping[str, Trainer], directory: Path, idle: Sequence[Path] = ()) -> None:
    """Every model's weights as ``directory/NAME``, all of them or none; models that did not learn in this stage are handed on."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, trainer in trainers.items():
        await trainer.export(partial / name)
    for model in idle:
        shutil.copytree(model, partial / model.name)
    await asyncio.to_thread(disk.sync, partial)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)
