"""Building the parts of a stage from its configuration: models, engines, trainers, data, rollout, rewards, the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from . import cut
from .buffer import Buffer
from .config import ModelConfig, RunConfig, StageConfig
from .cursor import Cursor
from .errors import ConfigError
from .hooks import Hooks
from .learner import Learner
from .loop import Loop
from .lora import holds_model
from .models import materialize
from .observer import Observer
from .producer import Producer
from .protocols import BuildContext, Cluster, DataSource, LossTerm, NeedsTokenizer, Players, RolloutEngine, Tokenizer, Tracker, Trainer
from .run_dir import RunDir
from .scoring import Scorer
from .starts import Start, starts
from .tokenizers import load_tokenizer
from .trace import Trace
from .waiting import deadline, gather


@dataclass(frozen=True)
class Origin:
    """Where a stage begins: its name, the steps of the run before it, and the cut to go on from, if any."""

    stage: str
    first_step: int
    directory: Path | None = None
    state: cut.CutState | None = None


async def assemble(
    config: RunConfig, run_dir: RunDir, origin: Origin, trackers: list[Tracker], hooks: Hooks, observer: Observer, cluster: Cluster
) -> Loop:
    """Build a stage. Nothing is started yet: ``start`` does that.

    Raises:
        MilesError: Whatever of it cannot be built.
    """
    observer.phase("build")
    stage = config.stages[origin.stage]
    base = _context(config, run_dir, origin, cluster)
    data: DataSource = await asyncio.to_thread(stage.data.build, base)
    begun = await asyncio.to_thread(model_starts, config, origin.stage, run_dir, data)
    tokenizers = {name: cast("Tokenizer", load_tokenizer(start.tokenizer)) for name, start in begun.items()}
    contexts = {name: _of_model(base, name, begun.get(name), tokenizers.get(name)) for name in stage.models}
    policies = tuple(name for name, model in stage.models.items() if model.has_samples)
    if isinstance(data, NeedsTokenizer) and policies[0] in tokenizers:
        for sentence in await asyncio.to_thread(data.use_tokenizer, tokenizers[policies[0]]):
            observer.note(sentence)
    trainers = {name: build_trainer(model, contexts[name]) for name, model in stage.models.items()}
    engines: dict[str, RolloutEngine] = {p: e.build(contexts[p]) for p in policies if (e := stage.models[p].engine) is not None}
    players = Players(config.name, config.seed, policies, engines, tokenizers, {n: len(t) for n, t in tokenizers.items()})

    trace, state = Trace(run_dir.logs / "trace.json"), origin.state
    producer = _producer(config, origin, contexts[policies[0]], data, players, observer, trace)
    return Loop(
        name=origin.stage,
        stage=stage,
        run_dir=run_dir,
        first_step=origin.first_step,
        players=players,
        learners=[build_learner(p, stage, trainers, config.seed, base) for p in policies],
        trainers=trainers,
        transports={p: stage.models[p].transport.build(contexts[p]) for p in policies},
        buffer=producer.buffer,
        producer=producer,
        evaluators={n: e.build(contexts[policies[0]]) for n, e in stage.evaluators.items()},
        trackers=trackers,
        hooks=hooks,
        observer=observer,
        config_hash=config.fingerprint(),
        keep=config.keep_checkpoints,
        trace=trace,
        step=state.step if state else 0,
        saved_step=state.step if state else -1,
        owes_evaluation=state.owes_evaluation if state else False,
    )


def _context(config: RunConfig, run_dir: RunDir, origin: Origin, cluster: Cluster) -> BuildContext:
    """What every plug-in of a stage may use, whatever model it is for."""
    stage = config.stages[origin.stage]
    return BuildContext(
        run_dir.path,
        config.name,
        config.seed,
        device=device_of(config),
        bitwise=config.numerics == "bitwise",
        total_steps=stage.steps,
        stage=stage,
        stage_name=origin.stage,
        cluster=cluster,
    )


def _of_model(base: BuildContext, name: str, start: Start | None, tokenizer: Tokenizer | None) -> BuildContext:
    """The same for what is built for one model; without ``start`` its trainer brings its weights."""
    model = base.stage.models[name]
    return replace(
        base,
        model=name,
        role=model.role,
        total_steps=base.stage.steps - model.frozen_steps,
        model_path=start.path if start else None,
        lora=start.lora if start else None,
        tokenizer=tokenizer,
    )


def _producer(
    config: RunConfig, origin: Origin, context: BuildContext, data: DataSource, players: Players, observer: Observer, trace: Trace
) -> Producer:
    """Rollout's side of the loop, as it was at the cut if there is one.

    Args:
        config, origin: Of the run, and where the stage begins.
        context: Of the main policy.
        data, players: Prompts, and who samples.
        observer, trace: Who is told.
    """
    stage, state = config.stages[origin.stage], origin.state
    buffer = Buffer(stage.groups, stage.max_staleness, stage.steps, first_version=origin.first_step)
    producer = Producer(
        buffer=buffer,
        cursor=Cursor(data, config.seed, stage.shuffle),
        rollout=stage.rollout.build(context),
        players=players,
        scorer=Scorer(stage.rewards, context, stage.environment_weight),
        filters={n: f.build(context) for n, f in stage.group_filters.items()},
        group_seconds=stage.deadlines.group,
        trace=trace,
        on_group=lambda group: observer.progress(len(buffer.ready), stage.groups),
    )
    if state is not None and origin.directory is not None:
        buffer.counts, buffer.ready = state.buffer_counts(), cut.read_ready(origin.directory, state)
        producer.position, producer.reissue = state.position, list(state.in_flight)
    return producer


def device_of(config: RunConfig) -> str:
    """``cpu`` or ``cuda``; auto takes CUDA where there is any, and it can be used."""
    if config.device == "cpu" or (config.device == "auto" and config.numerics == "bitwise"):
        return "cpu"
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is cuda, but torch {torch.__version__} sees no GPU here; set device: cpu, or see what miles doctor says")
    return "cuda" if torch.cuda.is_available() else "cpu"


def model_starts(config: RunConfig, stage_name: str, run_dir: RunDir, data: DataSource) -> dict[str, Start]:
    """What each model of a stage begins with; models whose trainer brings its weights are left out."""
    paths = model_paths(config, stage_name, run_dir, data)
    return starts(config.stages[stage_name], paths, run_dir.models / stage_name, config.seed)


def model_paths(config: RunConfig, stage_name: str, run_dir: RunDir, data: DataSource) -> dict[str, Path]:
    """Hugging Face or PEFT directory that each model of a stage starts from: what the stage before exported, or made or fetched now.

    A model without path and config starts as the one it belongs to, which may be one that an earlier stage trained. Models whose
    trainer brings its weights are left out.
    """
    stage, directory = config.stages[stage_name], run_dir.models / stage_name
    named = {n: m for n, m in stage.models.items() if not m.trainer.brings_weights}
    paths: dict[str, Path] = {}
    for name, model in named.items():
        own = directory / name
        if holds_model(own):
            paths[name] = own
        elif model.path is not None or model.config is not None:
            paths[name] = materialize(model.path, model.config, model.tokenizer, texts_of(data), own, config.seed)
    for name, model in named.items():
        if name not in paths:
            start = model.of or next(n for n in stage.owners() if n != name)
            paths[name] = paths.get(start, directory / start)
    return paths


def texts_of(data: DataSource) -> Iterator[str]:
    """Everything a tokenizer can be trained on."""
    for index in range(len(data)):
        prompt = data[index]
        yield prompt.text + "".join(p.text for p in prompt.demonstration)


def build_trainer(model: ModelConfig, context: BuildContext) -> Trainer:
    """A trainer with its loss terms and aggregation."""
    losses = {
        name: LossTerm(loss.build(context), loss.coefficient, loss.unit, loss.proportional_to_advantage)
        for name, loss in model.losses.items()
    }
    return model.trainer.build(replace(context, losses=losses, aggregation=model.aggregation.build(context)))


def build_learner(policy: str, stage: StageConfig, trainers: Mapping[str, Trainer], seed: int, context: BuildContext) -> Learner:
    """A policy and its servants."""
    model = stage.models[policy]
    servants = {n for n, m in stage.models.items() if not m.has_samples and m.of in (None, policy)}
    kl = model.kl_reward
    return Learner(
        policy=policy,
        stage=stage,
        trainers={n: t for n, t in trainers.items() if n == policy or n in servants},
        advantage=model.advantage and model.advantage.build(context),
        filters={n: f.build(context) for n, f in stage.sample_filters.items()},
        seed=seed,
        corrections={n: c.build(context) for n, c in model.corrections.items()},
        kl_reward=(kl.estimator.build(context), kl.coefficient) if kl else None,
    )


async def start(loop: Loop, origin: Origin) -> None:
    """Get engines and trainers ready, all at a time, each within its deadline; the trainers go on from the cut if there is one.

    Raises:
        MilesError: One of them does not get ready.
    """
    seconds = loop.stage.deadlines.start
    await gather(deadline(part.start(), seconds, "the run", f"the {who} to get ready") for who, part in _parts(loop))
    if origin.directory is not None:
        for name, trainer in loop.learning().items():
            await trainer.load(origin.directory / "models" / name)


def _parts(loop: Loop) -> list[tuple[str, RolloutEngine | Trainer]]:
    engines = [(f"engine of {n}", e) for n, e in loop.players.engines.items()]
    return [*engines, *((f"trainer of {n}", t) for n, t in loop.trainers.items())]


async def close(loop: Loop) -> None:
    """Give up engines and trainers, each within its deadline; every one is tried."""
    seconds = loop.stage.deadlines.close
    errors = []
    for who, part in _parts(loop):
        try:
            await deadline(part.close(), seconds, "the run", f"the {who} to close")
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
