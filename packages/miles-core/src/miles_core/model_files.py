"""What is wrong with a Hugging Face directory, as a sentence: before it is read (files alone, no torch), and when it has been.

``check_files`` looks at the configuration, at the headers of the weights and at the tokenizer, in milliseconds whatever the size of the
weights. ``read_model`` is the one way in which transformers reads a model here; ``refuse_not_finite`` looks at the numbers themselves.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import lora
from .errors import ConfigError
from .headers import AGAIN, read_header
from .lora import is_adapter, read_config

if TYPE_CHECKING:
    from torch import Tensor

    from .protocols import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
EMBEDDING = "model.embed_tokens.weight"
LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")


def check_files(path: Path) -> None:
    """Raise a ConfigError unless a directory holds a whole model (config.json, weights, a tokenizer that fits if there is one), or a
    whole adapter.

    Read are JSON files and the headers of the safetensors. So that a file is as long as its header says, that every file of an index
    is there, that no layer is missing, and that the embedding has the shape that config.json gives it.
    """
    if is_adapter(path):
        read_config(path)
        read_header(path / lora.WEIGHTS)
        return
    if (path / lora.CONFIG).is_file():
        raise ConfigError(
            f"{path} holds a model (config.json) and an adapter ({lora.CONFIG}), which transformers would add to it without a word; move "
            "the files of one of them to a directory of its own"
        )
    config = _config(path)
    shapes = weight_shapes(path)
    _check_layers(path, config, shapes)
    _check_embedding(path, config, shapes)
    tokenizer = path / "tokenizer.json"
    if tokenizer.is_file():
        state = tokenizer.stat()
        check_vocabulary(path, _last_written(tokenizer, state.st_mtime_ns, state.st_size))


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises a ConfigError if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}; copy it again from where the model is") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}; expected a JSON object. Copy it again from where the model is")
    return found


def check_vocabulary(path: Path, written: Mapping[str, int]) -> None:
    """Text must not become ids that the model does not have. A model may have more ids than tokens (its matrix is padded).

    Args:
        path: Directory of model and tokenizer.
        written: Ids of the tokens that the tokenizer writes texts with, by token. Added ones do not count: some tokenizers have one that
            their model lacks (Gemma 3), which the engine refuses when a prompt holds it.

    Raises:
        ConfigError: The largest of them is beyond ``vocab_size`` of config.json.
    """
    config = path / "config.json"
    size = _field(json_object(config), "vocab_size") if config.is_file() else None
    if size is None or not written:
        return
    token = max(written, key=lambda token: written[token])
    if written[token] >= size:
        raise ConfigError(
            f"the tokenizer in {path} does not match the model: its token {token!r} has id {written[token]}, but {config.name} says "
            f"vocab_size {size}. Put the tokenizer files of this very model there."
        )


def declared_ends(path: Path) -> frozenset[int]:
    """Ids of the tokens that config.json and generation_config.json say end a text."""
    files = [file for file in (path / "config.json", path / "generation_config.json") if file.is_file()]
    declared = [_field(json_object(file), "eos_token_id") for file in files]
    return frozenset(id for ids in declared for id in (ids if isinstance(ids, list) else [ids]) if id is not None)


def ends_of_text(path: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Ids that end what a policy writes: the tokenizer's, and the declared ones if it is among them.

    Chat models declare several (end of turn, end of text). Where the tokenizer's is not one of them they are defaults that have nothing
    to do with this vocabulary.
    """
    declared = declared_ends(path)
    own = tokenizer.eos_token_id if tokenizer is not None else None
    return declared if own is None or own in declared else frozenset([own])


@contextmanager
def sentences(path: Path) -> Generator[None]:
    """Make a ConfigError of what transformers raises when it cannot make sense of a directory."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        if "does not recognize this architecture" in reason:
            raise ConfigError(_unknown_architecture(path)) from error
        raise ConfigError(f"{path} cannot be read by transformers: {type(error).__name__}: {reason[:300]}") from error


def read_model(auto_class: Any, path: Path, **options: Any) -> tuple[Any, set[str]]:
    """The model that a transformers Auto class reads from a directory, and the names of weights that are not there: who calls refuses
    them, or knows why they are missing.

    transformers' own report of the weights is not printed, nor what it says of tensor parallelism, which it is not asked for.

    Args:
        auto_class: Such as ``AutoModelForCausalLM``.
        path: A Hugging Face directory.
        options: Of ``from_pretrained``.

    Raises:
        ConfigError: ``check_files`` refuses the directory, transformers does not know the architecture, or a weight has another shape
            than config.json gives it, or there are layers that config.json does not have.
    """
    check_files(path)
    with _silent("modeling_utils", "distributed.tensor_parallel"), sentences(path):
        model, info = auto_class.from_pretrained(
            path, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    for name, have, wanted in sorted(info["mismatched_keys"]):
        raise ConfigError(_mismatch(path, name, tuple(have), tuple(wanted), len(info["mismatched_keys"])))
    known = {LAYER.sub("*", name) for name in model.state_dict()}
    if beyond := sorted(name for name in info["unexpected_keys"] if LAYER.search(name) and LAYER.sub("*", name) in known):
        raise ConfigError(
            f"{path} holds {len(beyond)} weights of layers that its config.json does not have, the first is {beyond[0]!r}; "
            "they do not belong together. Get the model again"
        )
    return model, set(info["missing_keys"])


def refuse_missing(model: Any, path: Path, missing: set[str]) -> None:
    """Raise a ConfigError if a weight was not in ``path``: transformers makes it up."""
    if missing:
        raise ConfigError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, the first is {min(missing)!r}; export it again")


def refuse_not_finite(weights: Iterable[tuple[str, Tensor]], path: Path) -> None:
    """Raise a ConfigError if a weight that was read from ``path`` holds NaN or infinity. Costs about one pass over the memory."""
    import torch

    with torch.no_grad():
        for name, weight in weights:
            if torch.isfinite(weight.sum()):  # many times faster than looking at each, and never finite if one is not
                continue
            if odd := int((~weight.isfinite()).sum()):  # a sum of large numbers may be infinite by itself
                raise ConfigError(
                    f"{path}: {odd:,} of {weight.numel():,} numbers in {name!r} are NaN or infinite (as {str(weight.dtype)[6:]}); training "
                    "would go on from nothing. Use an earlier checkpoint, or get the model again"
                )


def _config(path: Path) -> dict[str, Any]:
    """``config.json``, or the sentence of what the directory is instead."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{path} has no config.json; a model's path is a Hugging Face directory{_instead(path)}")
    config = json_object(file)
    if not config.get("model_type"):
        raise ConfigError(f"{file} has no model_type, so nobody knows what model it is. Get the model again")
    return config


def _instead(path: Path) -> str:
    """What else a directory looks like, and what was probably meant."""
    if (path / "run.json").is_file():
        ends = ", ".join(str(d.parent) for d in sorted(path.glob("models/final/*/config.json")))
        return (
            f". This one is a run's: its models are {ends}" if ends else f". This one is a run's: miles export {path} DIRECTORY makes one"
        )
    if (path / "trainer.json").is_file() or (path / "manifest.json").is_file():
        return ". This one is a part of a run's cut: miles export RUN DIRECTORY --step STEP makes one of it"
    inner = sorted(d.parent.name for d in path.glob("*/config.json"))
    return f". Below it are: {', '.join(inner[:5])}" if inner else ""


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by name, from the headers of the files that transformers would read. Raises a ConfigError unless all of them
    are there and whole."""
    index = path / INDEX
    if not index.is_file():
        if not (path / WEIGHTS).is_file():
            pickled = " Files that Python pickled (*.bin) are not read: convert them." if any(path.glob("*.bin")) else ""
            raise ConfigError(f"{path} has no {WEIGHTS} and no {INDEX}; a model's path is a directory with its weights.{pickled}")
        return read_header(path / WEIGHTS).shapes
    held = json_object(index).get("weight_map")
    if not isinstance(held, dict) or not held or not all(isinstance(name, str) for name in held.values()):
        raise ConfigError(f"{index} is not an index of safetensors: it has no weight_map from weights to files; get the model again")
    files = sorted(set(held.values()))
    if missing := [name for name in files if not (path / name).is_file()]:
        raise ConfigError(
            f"{path / missing[0]} is missing, and {len(missing) - 1} more of the {len(files)} files that {INDEX} names. {AGAIN}"
        )
    found = {name: read_header(path / name).shapes for name in files}
    for weight, name in held.items():
        if weight not in found[name]:
            raise ConfigError(f"{path / name} lacks {weight!r}, which {INDEX} says is there; the two are not of one model. {AGAIN}")
    return {weight: shape for shapes in found.values() for weight, shape in shapes.items()}


def _check_layers(path: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A layer of which nothing is there was lost with a file, or belongs to another model."""
    layers = config.get("num_hidden_layers")
    numbers = {int(found[1]) for name in shapes if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    if not isinstance(layers, int) or not numbers:  # models that say it otherwise: transformers will
        return
    if missing := sorted(set(range(layers)) - numbers):
        raise ConfigError(
            f"{path} lacks layer {missing[0]}: config.json says num_hidden_layers {layers}, weights of {len(numbers)} are there"
        )


def _check_embedding(path: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = (config.get("vocab_size"), config.get("hidden_size"))
    have = shapes.get(EMBEDDING)
    if have is not None and None not in wanted and have != wanted:
        raise ConfigError(_mismatch(path, EMBEDDING, have, wanted, 1))


def _mismatch(path: Path, name: str, have: tuple[int, ...], wanted: tuple[Any, ...], count: int) -> str:
    more = f" ({count} weights are so)" if count > 1 else ""
    return (
        f"{path}: {name!r} is {list(have)}, by config.json it is {list(wanted)}{more}; they do not belong together. "
        "Put the config.json of these very weights there"
    )


@lru_cache(maxsize=16)
def _last_written(file: Path, mtime_ns: int, size: int) -> dict[str, int]:
    """The token with the largest id among those of a tokenizer.json that texts are written with; empty where its form is another.

    Large vocabularies take tenths of a second, and everybody who reads a model looks: the same file is read once (time and size say so).
    """
    tokenizer = json_object(file)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = {entry.get("content") for entry in tokenizer.get("added_tokens") or [] if isinstance(entry, dict)}
    if isinstance(vocabulary, list):  # unigram: pairs of token and score, in the order of ids
        vocabulary = {entry[0]: id for id, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    written = {token: id for token, id in (vocabulary or {}).items() if token not in added and isinstance(id, int)}
    return dict([max(written.items(), key=lambda item: item[1])]) if written else {}


def _field(config: dict[str, Any], name: str) -> Any:
    """Of the model, or of its text part."""
    text = config.get("text_config")
    own = config.get(name)
    return text.get(name) if own is None and isinstance(text, dict) else own


def _unknown_architecture(path: Path) -> str:
    from importlib.metadata import version

    config = json_object(path / "config.json")
    return (
        f"{path}/config.json says model_type {config.get('model_type')!r}, which transformers {version('transformers')} does not know; "
        "correct it if it is a slip, else this model needs another transformers"
    )


@contextmanager
def _silent(*modules: str) -> Generator[None]:
    """transformers' modules say only errors meanwhile."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in modules]

    def errors(record: logging.LogRecord) -> bool:  # one of our own, not a level: models are read in several threads at a time
        return record.levelno >= logging.ERROR

    for logger in loggers:
        logger.addFilter(errors)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(errors)
