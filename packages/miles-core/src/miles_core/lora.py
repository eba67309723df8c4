"""Low-rank adapters as files: PEFT directories, the model each belongs to, and what of PEFT Miles does. No torch here.

``adapters.py`` puts them into models. LoRA: Hu et al. 2021 (arXiv:2106.09685), y = W x + alpha / rank · B A x.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import ConfigError, DataError
from .headers import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_DIGEST = "miles_base"
"""Key of the safetensors metadata that says which weights an adapter was trained beside (``base_digest``)."""
LOOKED_AT = 4096
"""Bytes of each tensor that ``base_digest`` reads: models that differ differ there, and large ones are told apart in no time."""

UNDERSTOOD = frozenset(
    {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"}
    | {"alpha_pattern", "lora_dropout", "init_lora_weights", "fan_in_fan_out", "megatron_core", "qalora_group_size"}
)
"""Keys of adapter_config.json that may say anything. (Dropout is left out: engine and trainer must give the same numbers.)"""
PLAIN_STARTS = (True, False, "gaussian")
"""Values of ``init_lora_weights`` that leave the base as it is."""


@dataclass(frozen=True)
class Lora:
    """The adapter of a model.

    Attributes:
        base: What adapter_config.json names as ``base_model_name_or_path``: a directory, or a hub id.
        directory: The PEFT directory that it begins with; None for a new one, which the others describe.
        rank, alpha: As in the recipe.
        targets: Names of the modules that get one; None: all linear ones but the output projection.
        seed: New ones are drawn from it.
    """

    base: str
    directory: Path | None = None
    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] | None = None
    seed: int = 0


def is_adapter(directory: Path) -> bool:
    """Whether it is a PEFT directory, without a model of its own."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def holds_model(directory: Path) -> bool:
    """Whether a model lies there: whole, or as an adapter."""
    return (directory / "config.json").is_file() or is_adapter(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json. Raises ConfigError where it cannot be read, or asks for what is not plain LoRA."""
    file = directory / CONFIG
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}; give a PEFT directory") from None
    kind = found.get("peft_type") if isinstance(found, dict) else None
    if kind != "LORA":
        raise ConfigError(f"{file} describes an adapter of type {kind!r}; Miles does LORA")
    strange = {k: v for k, v in found.items() if k not in UNDERSTOOD and v not in (None, False, {}, [], "none")}
    if found.get("init_lora_weights", True) not in PLAIN_STARTS:
        strange["init_lora_weights"] = found["init_lora_weights"]  # it changes the base
    for key, value in strange.items():
        raise ConfigError(f"{file} has {key}: {json.dumps(value)}, which is more than plain LoRA; merge that adapter, and give the model")
    if not isinstance(found.get("r"), int) or not found.get("target_modules"):
        raise ConfigError(f"{file} does not say its r and target_modules; give a PEFT directory")
    return found


def base_of(directory: Path) -> str:
    """The model that an adapter names as its own. Where that is models/STAGE/NAME of a run which was moved, it is the one of the run in
    which the adapter lies now. Raises ConfigError if it names none, or a revision of one."""
    said = read_config(directory)
    base, revision = said.get("base_model_name_or_path"), said.get("revision")
    if not base:
        raise ConfigError(
            f"{directory / CONFIG} does not name its model (base_model_name_or_path); give the model as path and this as lora.path"
        )
    if revision not in (None, "main"):
        raise ConfigError(
            f"{directory / CONFIG} names revision {revision!r} of {base}, and only the newest of a model is fetched; get that revision "
            "into a directory, give it as path and this as lora.path"
        )
    beside = directory.resolve().parent.parent.joinpath(*Path(base).parts[-2:])
    return str(beside) if Path(base).is_absolute() and not Path(base).exists() and beside.is_dir() else str(base)


def name_base(directory: Path, base: str) -> None:
    """Have adapter_config.json name this model."""
    (directory / CONFIG).write_text(json.dumps(read_config(directory) | {"base_model_name_or_path": base}, indent=2, sort_keys=True))


def base_digest(directory: Path) -> str:
    """Digest of the model in a Hugging Face directory: names, dtypes, shapes and the first numbers of its weights, however they are
    spread over files. Raises ConfigError where a file is no safetensors file, or not whole."""
    seen: dict[str, bytes] = {}
    for file in sorted(directory.glob("*.safetensors")):
        header = read_header(file)
        with file.open("rb") as opened:
            for name, entry in header.tensors.items():
                start, end = entry["data_offsets"]
                opened.seek(header.begin + start)
                seen[name] = f"{name}|{entry['dtype']}|{entry['shape']}|".encode() + opened.read(min(end - start, LOOKED_AT))
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(seen):
        digest.update(seen[name])
    return digest.hexdigest()


def check_base(adapter: Path, model: Path, digest: str) -> None:
    """Raise a DataError if an adapter says that it was trained beside other weights than those in ``model``, whose ``base_digest`` is
    given. PEFT itself records none; what does not fit by name or shape is found when the adapter is put in."""
    if not (adapter / WEIGHTS).is_file():
        raise DataError(
            f"{adapter} holds no {WEIGHTS}, so no adapter that is read here (a pickled adapter_model.bin: save it as safetensors)"
        )
    said = read_header(adapter / WEIGHTS).metadata.get(BASE_DIGEST)
    if said is not None and said != digest:
        raise DataError(
            f"the adapter in {adapter} belongs to another model: it was trained beside other weights than those in {model}. Give the model "
            "that its adapter_config.json names, with the weights it had then"
        )


def check_adapter(directory: Path) -> None:
    """Raise a ConfigError if what ``lora.path`` names is a whole model."""
    if not is_adapter(directory):
        raise ConfigError(f"lora.path: {directory} holds a whole model, no adapter ({CONFIG}); give it as the model's path")


def without_base(adapter: Path, base: str, error: ConfigError) -> ConfigError:
    """That the model which an adapter names is not there."""
    return ConfigError(
        f"the adapter in {adapter} names {base!r} as its model: {error}. Or give the model as path and the adapter as lora.path"
    )


def tokenizer_of(adapter: Path | None, model: Path) -> Path:
    """Where the tokenizer of a model with an adapter lies: an adapter may bring its own, with a chat template, say."""
    return adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else model


def lacks_peft() -> str | None:
    """A sentence where PEFT is not installed."""
    return None if find_spec("peft") else "LoRA needs peft, which is not installed; pip install 'miles-train[lora]' 'miles-rollout[lora]'"
