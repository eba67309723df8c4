"""Whether a server runs the model that is trained, by all that it tells of itself; before anything is sampled from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from miles_core.errors import ConfigError, DataError

from .answers import ServerInfo
from .probe import SGLANG
from .shape import ModelShape

LAYER = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")
"""How parameters of the language model's layers are called."""


def check_server(name: str, info: ServerInfo, held: Mapping[str, str], model: ModelShape, model_path: Path, dtype: str) -> None:
    """Compare one server with the model that is trained.

    What only its own directory says (hidden sizes, the position encoding, …) is compared where that can be read from here.

    Args:
        name: Of the server, for messages.
        info: What it says of itself.
        held: Its parameters' checksums by name.
        model, model_path: What it should run, and where that is.
        dtype: Of the weights.

    Raises:
        ConfigError: It is of another release, serves another model or dtype, takes longer contexts than the model has positions, does
            not record routing, or does not run the model as it was made.
    """
    if info.release != SGLANG:
        raise ConfigError(f"{name} is SGLang {info.release}; Miles speaks to {SGLANG}")
    if info.dtype not in (dtype, "auto"):
        raise ConfigError(f"{name} serves {info.dtype} weights, the engine's dtype is {dtype}; make them the same")
    if info.architectures and model.architectures and info.architectures != model.architectures:
        raise _other(name, f"is {', '.join(info.architectures)}", model_path, f"is {', '.join(model.architectures)}")
    if info.directory.is_dir() and info.directory.absolute() != model_path.absolute():
        _check_directory(name, info.directory, model, model_path)
    if model.positions is not None and info.max_length > model.positions:
        raise _other(name, f"takes {info.max_length} tokens", model_path, f"has {model.positions} positions")
    if model.moe_layers and not info.records_routing:
        raise ConfigError(f"{name} does not record routed experts; start it with --enable-return-routed-experts")
    _check_experts(name, held, model, model_path)
    _check_layers(name, held, model, model_path)
    _check_output(name, held, model, model_path)


def check_alike(layouts: Mapping[str, str]) -> None:
    """Raise a ConfigError unless all servers, by name, are cut alike: checksums are of each rank's own parts of the weights."""
    (first, layout), *others = layouts.items()
    if different := [name for name, other in others if other != layout]:
        raise ConfigError(
            f"{different[0]} is cut otherwise ({layouts[different[0]]}) than {first} ({layout}): the servers of one engine are compared by "
            "checksums of what their ranks hold. Start them alike, or leave one out."
        )


def _other(name: str, found: str, model_path: Path, expected: str) -> ConfigError:
    return ConfigError(f"{name} serves another model: it {found}, {model_path} {expected}. Start it from the model that is trained.")


def _check_directory(name: str, directory: Path, model: ModelShape, model_path: Path) -> None:
    try:
        own = ModelShape.read(directory)
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be compared with {model_path}, as what it was started from cannot be read: {error}") from error
    for field in sorted(own.fields.keys() | model.fields.keys()):
        if own.fields.get(field) != model.fields.get(field):
            found = f"was started from {directory}, where {field} is {own.fields.get(field)}"
            raise _other(name, found, model_path, f"says {model.fields.get(field)}")
    try:
        model.check_same(own, directory)
    except DataError as error:
        raise ConfigError(f"{name} serves another model: {error}") from error


def _check_experts(name: str, held: Mapping[str, str], model: ModelShape, model_path: Path) -> None:
    """SGLang builds experts into every layer of some models, whatever their config says; such a model's numbers are wrong."""
    layers = {int(part) for parameter in held if ".experts." in parameter for part in parameter.split(".") if part.isdecimal()}
    if layers != set(model.moe_layers):
        raise ConfigError(
            f"{name} has experts in layers {sorted(layers)}, where {model_path}/config.json declares them in {list(model.moe_layers)}: "
            f"SGLang {SGLANG} does not run this model as it was made. Use another engine for it."
        )


def _check_layers(name: str, held: Mapping[str, str], model: ModelShape, model_path: Path) -> None:
    layers = {int(match[1]) for parameter in held if (match := LAYER.match(parameter))}
    if layers and layers != set(range(model.layers)):
        raise _other(name, f"has {len(layers)} layers", model_path, f"has {model.layers}")


def _check_output(name: str, held: Mapping[str, str], model: ModelShape, model_path: Path) -> None:
    """SGLang gives some models an output projection of their own although it is the embedding; it stays as it was drawn."""
    own = held.get("lm_head.weight")
    if model.tied and own is not None and own != held.get("model.embed_tokens.weight"):
        raise ConfigError(
            f"{model_path}/config.json ties the output projection to the embedding, but {name} has one of its own, which "
            f"no checkpoint fills: SGLang {SGLANG} does not run this model as it was made. Set tie_word_embeddings: false in a model "
            "built from scratch, else use another engine for it."
        )
