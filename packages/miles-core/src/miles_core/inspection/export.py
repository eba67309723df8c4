"""``miles export RUN DIR``: a policy of a run as a Hugging Face (or, with LoRA, PEFT) directory with its tokenizer and a model card.

The end of a finished run lies there as such a directory and is copied; a checkpoint is loaded into the trainer that wrote it, which
then exports. Nothing in the run's directory is changed.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .. import cut
from ..config import RunConfig, StageConfig
from ..errors import CheckpointError, ConfigError, MilesError, RunError
from ..lora import base_of, holds_model, is_adapter, name_base
from ..plugin_finding import did_you_mean
from ..protocols import BuildContext
from ..run_dir import RunDir
from .card import model_card


@dataclass(frozen=True)
class Source:
    """Where the weights come from.

    Attributes:
        step: Steps of the run that they have been through.
        stage: Name of the stage they are from.
        directory: ``models/final/NAME``, or a cut.
        finished: Whether it is the former.
    """

    step: int
    stage: str
    directory: Path
    finished: bool


def export(run: RunDir, target: Path, step: int | None = None, model: str | None = None, merge: bool = False) -> Source:
    """Write ``target``, whole or not at all.

    Args:
        run: The run; it may go on meanwhile.
        target: A directory that does not exist yet.
        step: Of the run; without it the end of a finished run, else its newest cut.
        model: The policy, where there are several.
        merge: Add an adapter to its model's weights. Else it is written as a PEFT directory, which names its model.

    Raises:
        ConfigError: ``target`` exists; there is no such step or policy; or it has no adapter to merge.
        CheckpointError: The run has saved nothing yet, or the cut is damaged, or vanishes meanwhile.
        RunError: The directory cannot be written.
    """
    if target.exists():
        raise ConfigError(f"{target} exists; an export overwrites nothing. Name a new directory, or move it away.")
    config = RunConfig.from_resolved(run.config)
    source = source_of(run, config, step, name_of(config, model))
    name = name_of(config, model, source.stage)
    saved = [path for path in source.directory.rglob("*") if path.is_file()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            written = Path(scratch) / "model"
            if source.finished:
                copy_files(saved, source.directory, written)
                if is_adapter(written):
                    name_base(written, base_of(source.directory))
            else:
                asyncio.run(export_cut(run, config, source, name, written))
            if merge:
                written = merged(written, Path(scratch) / "merged")
            adapter_of = base_of(written) if is_adapter(written) else None
            (written / "README.md").write_text(model_card(run, config, source.stage, name, source.step, target.resolve().name, adapter_of))
            os.replace(written, target)
    except (OSError, MilesError) as error:
        if lost := next((path for path in saved if not os.access(path, os.R_OK)), None):
            raise CheckpointError(
                f"{lost} cannot be read, or is gone since the export began: a run that goes on keeps its newest checkpoints "
                "(keep_checkpoints). Export again."
            ) from error
        if isinstance(error, MilesError):
            raise
        raise RunError(f"{target} cannot be written: {error.strerror or error}. Is there room, and is it yours to write to?") from error
    return source


def merged(adapter: Path, directory: Path) -> Path:
    """``directory``, with the sum of an adapter and its model. Raises ConfigError if it is none."""
    from ..adapters import merge
    from ..starts import base_directory

    if not is_adapter(adapter):
        raise ConfigError("the policy was trained without lora: its weights are whole already; leave --merge out")
    merge(adapter, base_directory(adapter)[1], directory)
    return directory


def copy_files(files: list[Path], source: Path, target: Path) -> None:
    """Each of the files, to the same place below ``target``. Raises OSError if one is gone, where copying a tree would leave it out."""
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)


def name_of(config: RunConfig, wanted: str | None, stage: str | None = None) -> str:
    """The policy that is meant: the wanted one, or the only one of a stage (the last by default). Raises ConfigError."""
    models = config.stages[stage or list(config.stages)[-1]].models
    names = [n for n, m in models.items() if m.has_samples]
    if wanted is None and len(names) > 1:
        raise ConfigError(f"the run has several policies; name one with --model: {', '.join(names)}")
    if wanted is not None and wanted not in models:
        raise ConfigError(f"the run has no model {wanted!r}.{did_you_mean(wanted, list(models))} It has {', '.join(models)}.")
    return wanted or names[0]


def source_of(run: RunDir, config: RunConfig, step: int | None, name: str) -> Source:
    """The end of the run, or a cut. Raises ConfigError where there is no such step, CheckpointError where nothing is saved at all."""
    total = sum(stage.steps for stage in config.stages.values())
    final = run.models / "final" / name
    has_final = holds_model(final)
    if has_final and step in (None, total):
        return Source(total, list(config.stages)[-1], final, finished=True)
    cuts = {int(found[1]): p for p in run.checkpoints.glob("step-*") if (found := re.fullmatch(r"step-(\d+)", p.name))}
    if not cuts and not has_final:
        raise CheckpointError(f"{run.path} has saved no weights yet: no checkpoint (every.checkpoint says how often), and no end.")
    if step is not None and step not in cuts:
        there = [f"step {n}" for n in sorted(cuts)] + ([f"step {total} (the end)"] if has_final and total not in cuts else [])
        raise ConfigError(
            f"{run.path} has no weights of step {step}, only of {', '.join(there)} (keep_checkpoints says how many are kept)."
        )
    chosen = cuts[max(cuts) if step is None else step]
    state = cut.read(chosen)
    if state.config_hash != config.fingerprint():
        raise CheckpointError(f"{chosen} was written by another configuration than {run.config} holds. Put the run's own config.yaml back.")
    return Source(state.global_step, state.stage, chosen, finished=False)


async def export_cut(run: RunDir, config: RunConfig, source: Source, name: str, directory: Path) -> None:
    """Build the trainer of a cut's model, load the cut, have it export. Needs what the run needed."""
    from ..assembly import build_trainer, device_of, model_starts
    from ..tokenizers import load_tokenizer
    from ..waiting import deadline

    stage: StageConfig = config.stages[source.stage]
    saved = source.directory / "models" / name
    if not saved.is_dir():
        raise ConfigError(f"{source.directory} holds no model {name!r}: it does not learn in stage {source.stage!r}")
    with tempfile.TemporaryDirectory(prefix="miles-export-") as scratch:  # what trainers and ranks write on the way is not the run's
        base = BuildContext(Path(scratch), config.name, config.seed, device=device_of(config), stage=stage, stage_name=source.stage)
        data = stage.data.build(base)
        begun = (await asyncio.to_thread(model_starts, config, source.stage, run, data)).get(name)
        base.cluster = config.cluster.build(base)
        model = stage.models[name]
        base.model, base.role, base.total_steps = name, model.role, stage.steps
        if begun is not None:
            base.model_path, base.lora, base.tokenizer = begun.path, begun.lora, load_tokenizer(begun.tokenizer)
        trainer = build_trainer(model, base)
        try:
            await deadline(trainer.start(), stage.deadlines.start, "the export", f"the trainer of {name} to get ready")
            await deadline(trainer.load(saved), stage.deadlines.start, "the export", f"the trainer of {name} to load {saved}")
            await deadline(trainer.export(directory), stage.deadlines.publish, "the export", f"the trainer of {name} to write its weights")
        finally:
            await deadline(trainer.close(), stage.deadlines.close, "the export", f"the trainer of {name} to close")
            await base.cluster.close()
