"""What each model of a stage begins with: a Hugging Face directory, and an adapter beside it where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .config import LoraConfig, ModelConfig, StageConfig
from .disk import write_whole
from .errors import ConfigError, DataError
from .lora import Lora, base_digest, base_of, check_adapter, check_base, is_adapter, tokenizer_of, without_base
from .models import fetch, is_hub_id

KEPT_DIGEST = "base_digest"
"""Beside what a model begins with, in ``models/STAGE/NAME``: ``base_digest`` of the weights that its adapter was put on."""


def base_directory(adapter: Path) -> tuple[str, Path]:
    """The model that an adapter belongs to: what to call it, and its directory.

    Raises:
        ConfigError: It is not there, or an adapter too.
        DataError: It is there, with other weights.
    """
    named = base_of(adapter)
    try:
        base = fetch(named)
    except ConfigError as error:
        raise without_base(adapter, named, error) from error
    if is_adapter(base):
        raise ConfigError(f"the adapter in {adapter} names {named!r} as its model, which is an adapter too; merge that one first")
    check_base(adapter, base, base_digest(base))
    return named, base


@dataclass(frozen=True)
class Start:
    """The beginning of a model.

    Attributes:
        path: Hugging Face directory with weights and tokenizer.
        lora: The adapter beside these weights, which are frozen then; None where all are the model's own.
        tokenizer: Directory of the tokenizer: the adapter's, where it brings one.
    """

    path: Path
    lora: Lora | None = None

    @property
    def tokenizer(self) -> Path:
        return tokenizer_of(self.lora.directory if self.lora else None, self.path)


def starts(stage: StageConfig, paths: Mapping[str, Path], directory: Path, seed: int) -> dict[str, Start]:
    """The start of each model.

    Policies with ``lora`` train an adapter; references and teachers that are one are read as one. All others begin with the sum of
    weights and adapter, which is written to ``directory/NAME/merged``.

    Args:
        stage: The stage.
        paths: By model name, from ``model_paths``: Hugging Face directories, or PEFT directories.
        directory: The stage's own, ``models/STAGE`` of the run.
        seed: New adapters are drawn from it.

    Raises:
        ConfigError: A PEFT directory is none, the model that it names is not there, or ``lora`` describes another adapter.
        DataError: An adapter belongs to another model, or the stage began beside other weights than those that are there now.
    """
    return {name: _start(name, stage, paths, directory, seed) for name in paths}


def _start(name: str, stage: StageConfig, paths: Mapping[str, Path], directory: Path, seed: int) -> Start:
    model, path = stage.models[name], paths[name]
    adapter = path if is_adapter(path) else _beside(name, stage, paths)
    if adapter is None:
        if model.lora is None:
            return Start(path)
        _keep_base(directory / name, path)
        return Start(path, _new(model, path, seed))
    if adapter == path != directory / name and model.lora is not None:
        check_undescribed(model.lora, adapter)
    named, base = base_directory(adapter) if adapter == path else (_name(model, path), path)
    if (model.lora or model.role in ("reference", "teacher")) and model.trainer.takes_lora:
        _keep_base(directory / name, base)
        return Start(base, Lora(named, adapter))
    merged = directory / name / "merged"
    if not (merged / "config.json").is_file():
        from .adapters import merge

        merge(adapter, base, merged)
    return Start(merged)


def _beside(name: str, stage: StageConfig, paths: Mapping[str, Path]) -> Path | None:
    """The adapter of ``lora.path``: the model's own, or of the policy that it starts as."""
    model = stage.models[name]
    if model.lora is None and model.path is None and model.config is None:
        start = model.of or next((n for n in stage.owners() if n != name), name)
        model = stage.models[start] if paths.get(start) == paths[name] else model
    if model.lora is None or model.lora.path is None:
        return None
    found = fetch(model.lora.path)
    check_adapter(found)
    return found


def check_undescribed(lora: LoraConfig, adapter: Path) -> None:
    """Raise a ConfigError if a recipe describes the adapter that a model's path names."""
    if lora.described:
        raise ConfigError(f"lora: the adapter in {adapter} brings its own {', '.join(lora.described)}; leave that out (null)")


def _keep_base(directory: Path, base: Path) -> None:
    """Note beside what weights an adapter is trained; a cut holds the adapter alone, and a run that goes on needs the same ones."""
    kept, digest = directory / KEPT_DIGEST, base_digest(base)
    if not kept.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(kept, digest)
    elif kept.read_text() != digest:
        raise DataError(
            f"{base} holds other weights than when the stage began, and the run has an adapter of those. Put them back, or begin a new run"
        )


def _new(model: ModelConfig, path: Path, seed: int) -> Lora:
    assert model.lora is not None
    rank = model.lora.rank or 16
    targets = None if model.lora.targets in (None, "all-linear") else tuple(model.lora.targets)
    return Lora(_name(model, path), None, rank, model.lora.alpha or 2 * rank, targets, seed)


def _name(model: ModelConfig, path: Path) -> str:
    """What others find the model by: its hub id, or its directory."""
    return model.path if model.path is not None and is_hub_id(model.path) else str(path.resolve())
