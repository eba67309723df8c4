"""Where a model's weights come from: a Hugging Face directory, the hub, or built from scratch with its tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import local_path
from .errors import ConfigError, PluginError
from .model_files import check_files
from .plugin_finding import EXTRAS, did_you_mean
from .tokenizers import TokenizerConfig, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

STAMP = "miles_built_from.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
UNDECLARED = {"head_dim"}  # several models read it from configs that do not declare it (qwen2, qwen3_moe, deepseek_v3 …)
FROM_TOKENIZER = ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")


def materialize(
    model_path: str | None,
    config: dict[str, Any] | None,
    tokenizer: TokenizerConfig | None,
    texts: Iterable[str],
    directory: Path,
    seed: int,
) -> Path:
    """A Hugging Face directory with a model's starting weights and tokenizer.

    Args:
        model_path: Local directory (of a model, or of an adapter: PEFT), or hub id (fetched into the hub's cache). The other arguments
            are then not used.
        config: Without ``model_path``: Hugging Face config fields with ``model_type``; the weights are drawn from ``seed``.
        tokenizer: Of the model built from ``config``; its vocabulary size and special ids go into the model's config.
        texts: What the tokenizer is for; read only if something is built.
        directory: Where to build. What was built there from the same inputs is used again.
        seed: Of the weights.

    Returns:
        The directory: ``model_path``, a snapshot in the hub's cache, or ``directory``.

    Raises:
        ConfigError: There is no such directory, hub model, model type or config field; the directory is no whole model (``check_files``);
            or ``directory`` holds something else.
        DataError: The tokenizer cannot be built for these texts.
    """
    if model_path is not None:
        return fetch(model_path)
    if config is None or tokenizer is None:
        raise ConfigError("a model needs a path (Hugging Face directory or hub id), or a config and a tokenizer to build it from scratch")
    known = list(texts) if tokenizer.kind == "bpe" else texts  # words do not depend on the texts
    stamp = _stamp(config, tokenizer, known if isinstance(known, list) else [], seed)
    if (directory / STAMP).is_file() and json.loads((directory / STAMP).read_text()) == stamp:
        return directory
    if directory.exists() and any(directory.iterdir()) and not (directory / STAMP).is_file():
        raise ConfigError(f"{directory} is not empty and was not built by Miles; move it away, or give it as the model's path")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        built = Path(scratch) / "model"
        _build(config, build_tokenizer(tokenizer, known), built, seed)
        (built / STAMP).write_text(json.dumps(stamp, indent=1))
        if directory.exists():
            directory.rename(Path(scratch) / "old")  # goes with the scratch directory
        built.rename(directory)
    return directory


def fetch(model_path: str) -> Path:
    """The directory that the path of a model or adapter names, or a snapshot of it in the hub's cache.

    Raises ConfigError: there is none, or what is there is not whole (``check_files``).
    """
    path = local_model(model_path) or _from_hub(model_path)
    check_files(path)
    return path


def local_model(model_path: str) -> Path | None:
    """The directory that a model path names; None for a hub id. Reads nothing from the network and imports nothing heavy.

    Raises ConfigError when it is neither.
    """
    path = local_path(model_path, "model path")
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(model_path):
        raise ConfigError(f"model path {model_path!r} is neither a directory nor a hub id of the form owner/name")
    return None


def is_hub_id(path: str) -> bool:
    """Whether a model's path names a model of the Hugging Face hub, not a directory of this machine."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).is_dir()


def _from_hub(model_path: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise PluginError(f"fetching {model_path} needs huggingface_hub; pip install '{EXTRAS['transformers']}'") from error
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(model_path, allow_patterns=HUB_FILES))
    except (OSError, HTTPError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"model path {model_path!r} is no directory here, and it cannot be fetched from the Hugging Face hub: {reason} "
            "Correct the name, check the connection, or give a directory."
        ) from error


def _stamp(config: dict[str, Any], tokenizer: TokenizerConfig, texts: list[str], seed: int) -> dict[str, Any]:
    """Everything a built model follows from, but for the versions of the libraries."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    inputs = {"config": config, "tokenizer": tokenizer.model_dump(mode="json"), "texts": digest.hexdigest(), "seed": seed}
    return json.loads(json.dumps(inputs))


def _build(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, directory: Path, seed: int) -> None:
    """Draw weights (the process's own random state is left as it was) and write model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    built_config = _model_config(config, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(built_config)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise ConfigError(f"no language model can be built from config {config}: {reason}") from error
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _model_config(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The transformers config of a recipe's fields; every one of them must exist."""
    from dataclasses import fields as dataclass_fields

    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = str(fields.get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, list(CONFIG_MAPPING.keys()))
        raise ConfigError(f"model config: transformers has no model_type {model_type!r}.{near}")
    config_class = CONFIG_MAPPING[model_type]
    known = {f.name for f in dataclass_fields(config_class)} | set(config_class.attribute_map) | UNDECLARED
    for name in fields.keys() - {"model_type"}:
        if name in FROM_TOKENIZER:
            raise ConfigError(f"model config: {name} follows from the tokenizer; leave it out")
        if name not in known:
            raise ConfigError(f"model config: {model_type} has no field {name!r}.{did_you_mean(name, sorted(known))}")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    given: dict[str, Any] = fields | {"vocab_size": len(tokenizer)} | ids
    try:
        return config_class(**{name: value for name, value in given.items() if name != "model_type"})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"model config of {model_type}: {' '.join(str(error).split())}") from error
