"""What the checkpoints of both trainers have in common. No transformers here: ranks read this module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from miles_core.errors import CheckpointError


def read_tensors(path: Path, expected: Mapping[str, torch.Size], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file, each of them expected, of that shape, float32 and finite.

    Raises:
        CheckpointError: The file cannot be read, or a tensor of it is of another name, shape or dtype, or holds NaN or infinity.
    """
    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. The checkpoint is incomplete; use an earlier one.") from error
    for name, tensor in tensors.items():
        if name not in expected:
            raise CheckpointError(f"{path} holds {name!r}, which this model does not have: it belongs to another model")
        if tensor.shape != expected[name] or tensor.dtype != torch.float32:
            raise CheckpointError(
                f"{path}: {name!r} is {tensor.dtype} {list(tensor.shape)}, this model needs float32 {list(expected[name])}"
            )
        if odd := int((~tensor.isfinite()).sum()):
            raise CheckpointError(f"{path}: {odd} of {tensor.numel()} numbers in {name!r} are NaN or infinite. Use an earlier checkpoint")
    return tensors
