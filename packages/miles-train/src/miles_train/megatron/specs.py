"""Which Hugging Face architectures there are, as tables: config fields, weight names, and how each weight is cut. No torch here.

A new architecture is a ModelSpec in a module of one's own, registered as an entry point of the group ``miles.model_spec`` under the
name that its config.json gives in ``architectures``. The table drives the model's config, loading, sharding and export: nothing
else names a weight. The modules are those of ``layers.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Literal

from miles_core.errors import ConfigError

from .cuts import Cut, Shape

REQUIRED: Any = object()
MODEL_FIELDS = frozenset({"vocab_size", "max_sequence_length", "rotary_base", "share_embeddings_and_output_weights"})
"""What megatron's GPTModel takes as arguments; all other fields are TransformerConfig's."""

Convert = Callable[[Any, Mapping[str, Any]], Any]
"""(value of the field, whole config) → value for megatron. ValueError with a half sentence refuses it ("… is true, which …")."""


@dataclass(frozen=True)
class Field:
    """A field of config.json.

    Attributes:
        hf: Its name.
        megatron: The field of TransformerConfig or the argument of GPTModel that it sets; None: it is only looked at.
        convert: Its value → megatron's.
        default: Its value where config.json leaves it out; REQUIRED: it may not be left out.
    """

    hf: str
    megatron: str | None
    convert: Convert = lambda value, config: value
    default: Any = REQUIRED


def only(*values: Any) -> Convert:
    """Any other value is refused."""

    def check(value: Any, config: Mapping[str, Any]) -> Any:
        if value not in values:
            raise ValueError(f"is {value!r}, and only {' or '.join(map(repr, values))} is supported")
        return value

    return check


@dataclass(frozen=True)
class Weight:
    """One parameter of megatron's model and the tensors of the checkpoint that it is made of.

    Attributes:
        megatron: Its name, with {layer} and {expert} where it has one of each.
        cut: How it is cut over tensor-parallel ranks. Experts are spread whole over expert-parallel ranks instead.
        hf: Name → shape, in symbols of ``ModelSpec.sizes``, of the tensors in the checkpoint.
        layers: Which layers have it.
        tied_to: The name of the tensor that it equals where the config ties embedding and output projection.
    """

    megatron: str
    cut: Cut
    hf: Mapping[str, tuple[str, ...]]
    layers: Literal["all", "dense", "moe"] = "all"
    tied_to: str | None = None


@dataclass(frozen=True)
class Parameter:
    """A Weight with numbers put in: layer and expert count over the whole model.

    Attributes:
        weight: The row of the table.
        tensors: Names and whole shapes in the checkpoint.
        place: The pipeline stage that has it: the ``first``, the ``last``, or that of ``layer``.
        layer: Index of the layer, 0 outside of layers.
        expert: Index of the expert, None for what is not an expert's.
        copy: It repeats another parameter (a tied output projection on a stage of its own): loaded, never exported.
    """

    weight: Weight
    tensors: tuple[tuple[str, Shape], ...]
    place: Literal["first", "layer", "last"]
    layer: int = 0
    expert: int | None = None
    copy: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """One architecture.

    Attributes:
        architecture: As in ``architectures`` of config.json.
        model_type: As in ``model_type`` of config.json.
        fields: The fields of config.json that are known; others are refused unless they are empty (null, false, [], {}).
        ignored: Fields that change nothing in training.
        constants: TransformerConfig fields that are the same for all models of the architecture.
        sizes: Symbol → the fields of config.json whose product it is.
        weights: The parameters in the order in which they are exported; those before the ones with {layer} are on the first
            pipeline stage, those after them on the last.
    """

    architecture: str
    model_type: str
    fields: tuple[Field, ...]
    ignored: frozenset[str]
    constants: Mapping[str, Any]
    sizes: Mapping[str, tuple[str, ...]]
    weights: tuple[Weight, ...]

    def transformer(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of megatron's TransformerConfig. Raises ConfigError for what the table does not know (``model_spec`` did so before)."""
        return dict(self.constants) | {n: v for n, v in self._converted(hf_config).items() if n not in MODEL_FIELDS}

    def model(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of megatron's GPTModel: ``MODEL_FIELDS``."""
        return {n: v for n, v in self._converted(hf_config).items() if n in MODEL_FIELDS}

    def moe_layers(self, hf_config: Mapping[str, Any]) -> tuple[int, ...]:
        """Indices of the MoE layers, in model order (the L_moe axis of the routing column)."""
        return tuple(layer for layer, moe in enumerate(self._converted(hf_config).get("moe_layer_freq", ())) if moe)

    def kv_heads(self, hf_config: Mapping[str, Any]) -> int:
        """Key/value heads."""
        return self._converted(hf_config)["num_query_groups"]

    def parameters(self, hf_config: Mapping[str, Any]) -> Iterator[Parameter]:
        """Every parameter of the whole model, in the order of export."""
        config, place = normalised(hf_config), "first"
        moe, model = self.moe_layers(hf_config), self._converted(hf_config)
        for in_layers, rows in groupby(self.weights, lambda row: "{layer}" in row.megatron):
            rows = list(rows)
            if not in_layers:
                yield from (self._tied(self._numbered(row, config, place), model) for row in rows)
                continue
            place = "last"
            for layer in range(model["num_layers"]):
                for of_expert, some in groupby(rows, lambda row: "{expert}" in row.megatron):
                    some = [row for row in some if row.layers == "all" or (row.layers == "moe") == (layer in moe)]
                    for expert in range(model["num_moe_experts"] if of_expert and some else 1):
                        numbers = (layer, expert if of_expert else None)
                        yield from (self._numbered(row, config, "layer", *numbers) for row in some)

    def _numbered(self, row: Weight, config: Mapping[str, Any], place: Any, layer: int = 0, expert: int | None = None) -> Parameter:
        tensors = [
            (name.format(layer=layer, expert=expert), tuple(prod(config[f] for f in self.sizes[symbol]) for symbol in shape))
            for name, shape in row.hf.items()
        ]
        return Parameter(row, tuple(tensors), place, layer, expert)

    def _tied(self, parameter: Parameter, model: Mapping[str, Any]) -> Parameter:
        if parameter.weight.tied_to is None or not model["share_embeddings_and_output_weights"]:
            return parameter
        return replace(parameter, tensors=((parameter.weight.tied_to, parameter.tensors[0][1]),), copy=True)

    def _converted(self, hf_config: Mapping[str, Any]) -> dict[str, Any]:
        """Every field that megatron gets. Raises ConfigError for what is missing, unknown or refused."""
        config, result = normalised(hf_config), {}
        for field in self.fields:
            value = config.get(field.hf, field.default)
            if value is REQUIRED:
                raise ConfigError(f"config.json of a {self.architecture} lacks {field.hf!r}; it cannot be guessed, add it")
            try:
                converted = field.convert(value, config)
            except ValueError as error:
                raise ConfigError(
                    f"config.json: {field.hf} {error}; the megatron trainer's {self.architecture} does not do that, use trainer: torch"
                ) from error
            if field.megatron:
                result[field.megatron] = converted
        known = self.ignored | {field.hf for field in self.fields}
        for name, value in config.items():
            if name not in known and value not in (None, False, [], {}):
                raise ConfigError(
                    f"config.json: {name} is {value!r}, which the table of {self.architecture} does not know; what it asks for would be "
                    "left out without a word. If it changes nothing in training, remove it from config.json; else use trainer: torch"
                )
        return result


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory. Raises ConfigError if there is none or it is no JSON object."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{path} has no config.json; a model's path is a Hugging Face directory")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    return config


def normalised(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in one form, whichever version of transformers wrote it: ``rope_parameters`` instead of ``rope_theta`` and
    ``rope_scaling``, ``num_experts`` instead of ``num_local_experts``."""
    config = dict(hf_config)
    theta, scaling = config.pop("rope_theta", None), config.pop("rope_scaling", None)
    if not config.get("rope_parameters") and theta is not None:
        config["rope_parameters"] = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}
    if "num_local_experts" in config:
        config.setdefault("num_experts", config.pop("num_local_experts"))
    return config


def model_spec(hf_config: Mapping[str, Any]) -> ModelSpec:
    """The table of ``architectures[0]``: the entry point of the group ``miles.model_spec`` by that name.

    Raises:
        ConfigError: The architecture is unknown, or the config asks for something that the table does not know.
    """
    architectures = hf_config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError("config.json has no architectures; its first entry says which table of the megatron trainer is used")
    name = architectures[0]
    known = _entries()
    if name not in known:
        raise _unknown("config.json: architectures", name, known, f"entry point {name!r}")
    spec = _loaded(known[name])
    spec.transformer(hf_config)
    return spec


def check_model_type(name: str) -> None:
    """Raise a ConfigError if no table is for models of a ``model_type``: all that is known of a model before it is built."""
    known = [_loaded(entry).model_type for entry in _entries().values()]
    if name not in known:
        raise _unknown("config: model_type", name, known, "an entry point by its architecture's name")


def _entries() -> dict[str, metadata.EntryPoint]:
    return {entry.name: entry for entry in metadata.entry_points(group="miles.model_spec")}


def _unknown(field: str, name: str, known: Iterable[str], entry: str) -> ConfigError:
    return ConfigError(
        f"{field} says {name!r}, for which the megatron trainer has no table; known are {', '.join(sorted(known))}. Add one: a "
        f"miles_train.megatron.specs.ModelSpec, registered as {entry} in the group miles.model_spec; or use trainer: torch"
    )


def _loaded(entry: metadata.EntryPoint) -> ModelSpec:
    try:
        spec = entry.load()
    except Exception as error:
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
        raise ConfigError(f"model_spec {entry.name!r} of {package} ({entry.value}) does not import: {error!r}") from error
    if not isinstance(spec, ModelSpec) or spec.architecture != entry.name:
        raise ConfigError(f"model_spec {entry.name!r} ({entry.value}) must be a ModelSpec of that architecture; it is {spec!r:.200}")
    return spec
