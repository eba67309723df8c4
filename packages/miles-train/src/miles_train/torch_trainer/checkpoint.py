"""What a trainer leaves on disk: its own state, from which it goes on to the bit, and a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from miles_core.errors import CheckpointError

from ..tensor_files import TOKENIZER_FILES, read_tensors
from .model import PackedModel
from .optimizer import MasterAdamW

FORMAT = 1


def save_state(directory: Path, optimizer: MasterAdamW, counters: Mapping[str, int]) -> None:
    """Write master weights, AdamW's state and counters."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({n: p.detach().contiguous() for n, p in optimizer.masters.items()}, directory / "weights.safetensors")
    save_file(optimizer.state(), directory / "optimizer.safetensors")
    (directory / "trainer.json").write_text(json.dumps({"format": FORMAT, **counters}))


@torch.no_grad()
def load_state(directory: Path, optimizer: MasterAdamW, device: torch.device) -> dict[str, int]:
    """Put back what ``save_state`` wrote, and return the counters. Nothing is changed if anything does not fit."""
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
    weights = read_tensors(directory / "weights.safetensors", shapes, device)
    state = read_tensors(directory / "optimizer.safetensors", moments | {f"step.{name}": torch.Size() for name in shapes}, device)
    if missing := sorted(shapes.keys() - weights.keys()):
        raise CheckpointError(f"{directory / 'weights.safetensors'} lacks {missing[0]!r}: it belongs to another model")
    for name, master in optimizer.masters.items():
        master.copy_(weights[name])
    optimizer.load_state(state)
    optimizer.publish()
    return header


def export(directory: Path, model: PackedModel, source: Path) -> None:
    """Write config and weights as transformers does, and the tokenizer files of ``source``. Once config.json is there, all is."""
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
        model.hf.save_pretrained(scratch)
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                shutil.copyfile(file, Path(scratch) / file.name)
        for file in sorted(Path(scratch).iterdir(), key=lambda f: f.name == "config.json"):
            file.replace(directory / file.name)
