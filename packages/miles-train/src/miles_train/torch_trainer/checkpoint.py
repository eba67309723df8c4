"""What a trainer leaves on disk: its own state, from which it goes on to the bit, and a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

from miles_core.adapters import copy_tokenizer
from miles_core.errors import CheckpointError

from ..tensor_files import read_tensors
from .model import PackedModel
from .optimizer import MasterAdamW
from .parts import part_of, whole

FORMAT = 1


@dataclass(frozen=True)
class State:
    """All that a trainer goes on from.

    Attributes:
        masters: float32 by parameter name.
        moments: AdamW's state as ``<kind>.<parameter>``.
        counters: Whole numbers by name.
    """

    masters: dict[str, Tensor]
    moments: dict[str, Tensor]
    counters: dict[str, int]


def state_of(optimizer: MasterAdamW, counters: Mapping[str, int], kept: bool = True) -> State:
    """The state as a whole, whatever part of it this rank holds; collective if it is one of several.

    Args:
        optimizer: Where it is taken from.
        counters: What else is in it.
        kept: Whether this rank keeps it; the others only give their parts.
    """
    masters, moments = {}, {}
    for target, source in ((masters, optimizer.masters), (moments, optimizer.state())):
        for name, tensor in source.items():
            everything = whole(tensor.detach())
            if kept:
                target[name] = everything.cpu().contiguous()
    return State(masters, moments, dict(counters))


def write_state(directory: Path, state: State) -> None:
    """Write it as safetensors and JSON, the same files however many ranks it came from."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state.masters, directory / "weights.safetensors")
    save_file(state.moments, directory / "optimizer.safetensors")
    (directory / "trainer.json").write_text(json.dumps({"format": FORMAT, **state.counters}))


def read_state(directory: Path, optimizer: MasterAdamW) -> State:
    """What ``write_state`` wrote. Raises CheckpointError if anything of it does not fit the optimizer's parameters."""
    try:
        header = json.loads((directory / "trainer.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'trainer.json'} cannot be read: {error}. The checkpoint is incomplete; use an earlier one."
        ) from error
    if header.pop("format", None) != FORMAT:
        raise CheckpointError(f"{directory / 'trainer.json'} is not of format {FORMAT}, which this version of Miles reads")
    shapes = {name: master.shape for name, master in optimizer.masters.items()}
    moments = {f"{kind}.{name}": shape for name, shape in shapes.items() for kind in ("exp_avg", "exp_avg_sq")}
    weights = read_tensors(directory / "weights.safetensors", shapes)
    state = read_tensors(directory / "optimizer.safetensors", moments | {f"step.{name}": torch.Size() for name in shapes})
    if missing := sorted(shapes.keys() - weights.keys()):
        raise CheckpointError(f"{directory / 'weights.safetensors'} lacks {missing[0]!r}: it belongs to another model")
    return State(weights, state, header)


@torch.no_grad()
def put_back(optimizer: MasterAdamW, state: State) -> None:
    """Go on from a state: each rank takes its part of it, one tensor at a time, so that no device holds all of it."""
    for name, master in optimizer.masters.items():
        master.copy_(part_of(state.masters[name], master))
    optimizer.load_state(state.moments)
    optimizer.publish()


def export(directory: Path, model: PackedModel, source: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write config and weights as transformers does (an adapter as PEFT does), and the tokenizer files of ``source``. Once config.json
    (adapter_config.json) is there, all is.

    ``weights``: under the modules' own names, where the model's are elsewhere."""
    if model.adapter is not None:
        model.adapter.write(directory, weights)
        return
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
        model.hf.save_pretrained(scratch, state_dict=None if weights is None else dict(weights))
        if weights is not None:
            _say_dtype(Path(scratch) / "config.json", next(iter(weights.values())).dtype)
        copy_tokenizer(source, Path(scratch))
        for file in sorted(Path(scratch).iterdir(), key=lambda f: f.name == "config.json"):
            file.replace(directory / file.name)


def _say_dtype(file: Path, dtype: torch.dtype) -> None:
    """transformers says that of the model's own weights, which others than these may be."""
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n")
