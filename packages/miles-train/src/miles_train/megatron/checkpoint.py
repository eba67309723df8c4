"""What the ranks leave on disk: each its own part, once, from which the same layout goes on to the bit; and a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from miles_core.errors import CheckpointError
from miles_core.tokenizers import TOKENIZER_FILES

from ..ranks.layout import Layout
from ..tensor_files import read_tensors

if TYPE_CHECKING:  # it imports megatron, which the controller does not
    from .optimizer import ShardedAdamW

FORMAT = 1


def save_part(directory: Path, optimizer: ShardedAdamW, layout: Layout, rank: int) -> None:
    """Write the masters and AdamW's state of which this rank has the first copy. The directory exists."""
    state = optimizer.state()
    for part, names in _parts(optimizer, layout, rank, owned=True).items():
        masters = {n: optimizer.masters[n].detach().cpu().contiguous() for n in names}
        kept = set(names)
        moments = {k: x.cpu().contiguous() for k, x in state.items() if k.split(".", 1)[1] in kept}
        save_file(masters, directory / f"weights-{part}.safetensors")
        save_file(moments, directory / f"optimizer-{part}.safetensors")


def write_header(directory: Path, layout: Layout, counters: Mapping[str, int]) -> None:
    """Write what the whole is; last, when every rank's part is there."""
    (directory / "trainer.json").write_text(json.dumps({"format": FORMAT, "layout": asdict(layout), **counters}))


def read_header(directory: Path, layout: Layout) -> dict[str, int]:
    """The counters. Raises CheckpointError if there is no header, or it is of another format or layout."""
    file = directory / "trainer.json"
    try:
        header = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. The checkpoint is incomplete; use an earlier one.") from error
    saved = header.pop("layout", None)
    if header.pop("format", None) != FORMAT or saved is None:
        raise CheckpointError(f"{file} is not of format {FORMAT} of the megatron trainer, which this version of Miles reads")
    if saved != asdict(layout):
        raise CheckpointError(
            f"{directory} was saved with the layout {_said(saved)}; this trainer has {_said(asdict(layout))}. "
            "Resume with the layout of the checkpoint, or start a new run from exported weights"
        )
    return header


def read_part(directory: Path, optimizer: ShardedAdamW, layout: Layout, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Master weights and AdamW's state of this rank, all of them and each of the right shape. Raises CheckpointError."""
    weights: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for part, names in _parts(optimizer, layout, rank, owned=False).items():
        shapes = {n: optimizer.masters[n].shape for n in names}
        moments = {f"{kind}.{n}": shape for n, shape in shapes.items() for kind in ("exp_avg", "exp_avg_sq")}
        file = directory / f"weights-{part}.safetensors"
        weights |= read_tensors(file, shapes)
        if missing := sorted(shapes.keys() - weights.keys()):
            raise CheckpointError(f"{file} lacks {missing[0]!r}: it belongs to another model")
        file, expected = directory / f"optimizer-{part}.safetensors", moments | {f"step.{n}": torch.Size() for n in names}
        found = read_tensors(file, expected)
        if found and (missing := sorted(expected.keys() - found.keys())):  # before the first step there is no state at all
            raise CheckpointError(f"{file} lacks {missing[0]!r}. The checkpoint is incomplete; use an earlier one.")
        state |= found
    return weights, state


@torch.no_grad()
def apply_part(optimizer: ShardedAdamW, weights: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
    """Put back what ``read_part`` read."""
    for name, master in optimizer.masters.items():
        master.copy_(weights[name])
    device = next(iter(optimizer.masters.values())).device
    optimizer.load_state({key: x if key.startswith("step.") else x.to(device) for key, x in state.items()})
    optimizer.publish()


def export(directory: Path, buckets: Iterable[list[tuple[str, Tensor]]], source: Path, dtype: str) -> None:
    """Write a Hugging Face directory, a safetensors file for each bucket. Once config.json is there, all is.

    Args:
        directory: Made if it is not there.
        buckets: Named tensors; only one bucket is held at a time.
        source: The Hugging Face directory that the model was started from: config and tokenizer files are taken from it.
        dtype: Of the weights, as config.json says it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".export-") as name:
        scratch = Path(name)
        _write_buckets(scratch, buckets)
        for pattern in (*TOKENIZER_FILES, "generation_config.json"):
            for file in source.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        config: dict[str, Any] = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)
        (scratch / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
        for file in sorted(scratch.iterdir(), key=lambda f: f.name == "config.json"):
            file.replace(directory / file.name)


def _write_buckets(scratch: Path, buckets: Iterable[list[tuple[str, Tensor]]]) -> None:
    files: list[list[str]] = []
    size = 0
    for bucket in buckets:
        if bucket:
            save_file({n: t.contiguous() for n, t in bucket}, scratch / f"part-{len(files)}", metadata={"format": "pt"})
            files.append([n for n, _ in bucket])
            size += sum(t.nbytes for _, t in bucket)
    count = len(files)
    names = {0: "model.safetensors"} if count == 1 else {i: f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
    for i, name in names.items():
        (scratch / f"part-{i}").rename(scratch / name)
    if count > 1:
        index = {"metadata": {"total_size": size}, "weight_map": {n: names[i] for i, held in enumerate(files) for n in held}}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _parts(optimizer: ShardedAdamW, layout: Layout, rank: int, *, owned: bool) -> dict[str, list[str]]:
    """Names of this rank's parameters by the file they are in; with ``owned`` only where no rank before it has the same."""
    at = layout.coordinates(rank)
    dense, experts = f"stage{at.pipeline}-tensor{at.tensor}", f"stage{at.pipeline}-experts{at.expert}"
    parts: dict[str, list[str]] = {}
    for name, parameter in optimizer.parameters.items():
        if not getattr(parameter, "allreduce", True):  # megatron's mark of experts that are spread over ranks
            if not owned or at.expert_data == 0:
                parts.setdefault(experts, []).append(name)
        elif not owned or (at.data == 0 and at.context == 0):
            parts.setdefault(dense, []).append(name)
    return parts


def _said(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in layout.items())
