"""Nested state (``state_dict()`` of modules, optimizers, schedules) to files without pickle: tensors as safetensors, the rest as JSON.

Needs torch when it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from .errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any] | list[Any] | str | int | float | bool | None


def save_state(state: Any, directory: Path) -> None:
    """Write ``state.json`` and ``state.safetensors``.

    Raises DataError, naming where, for anything but tensors, numbers, texts, None, and lists, tuples and dicts of them.
    """
    from safetensors.torch import save_file

    skeleton, tensors = take_apart(state)
    save_file(tensors, directory / "state.safetensors")
    (directory / "state.json").write_text(json.dumps(skeleton))


def load_state(directory: Path) -> Any:
    """What ``save_state`` wrote, on the CPU; tuples stay tuples, keys keep their type. Raises CheckpointError if it cannot be read."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(directory / "state.safetensors")
        return _put_together(json.loads((directory / "state.json").read_text()), tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be read: {error}. The checkpoint is incomplete; use an earlier one.") from error


def take_apart(state: Any) -> tuple[Json, dict[str, Tensor]]:
    """What ``save_state`` would write. Raises as it does."""
    tensors: dict[str, Tensor] = {}
    return _take_apart(state, "state", tensors), tensors


def _take_apart(value: Any, where: str, tensors: dict[str, Tensor]) -> Json:
    """JSON in which lists and dicts are tagged, so that tuples and keys that are no texts come back as they were."""
    from torch import Tensor

    if isinstance(value, Tensor):
        name = where if where not in tensors else f"{where}#{len(tensors)}"  # the keys 0 and "0" look alike
        tensors[name] = value.detach().cpu().clone().contiguous()  # clone: safetensors refuses tensors that share memory
        return {"tensor": name}
    if isinstance(value, list | tuple):
        parts = [_take_apart(v, f"{where}.{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int | float | bool):
                raise DataError(f"{where} has the key {key!r} ({type(key).__name__}); a checkpoint holds texts and numbers as keys")
        return {"dict": [[key, _take_apart(v, f"{where}.{key}", tensors)] for key, v in value.items()]}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise DataError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold without pickle; keep tensors, numbers and texts")


def _put_together(skeleton: Json, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(skeleton, dict):
        return skeleton
    [(kind, content)] = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(v, tensors) for key, v in content}
    parts = [_put_together(v, tensors) for v in content]
    return tuple(parts) if kind == "tuple" else parts
