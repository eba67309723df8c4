"""What linear_logprob refuses, a sentence each."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_arguments(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor, bias: Tensor | None, chunk: int | None
) -> tuple[torch.dtype, Tensor]:
    """The dtype of the maths and the temperature as a tensor [T]; ValueError with a sentence on what the op cannot take."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, D] and weight [V, D] with one D; they are {list(hidden.shape)} and {list(weight.shape)}.")
    (rows, _), vocab = hidden.shape, weight.shape[0]
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{rows}], one a row of hidden; it is {targets.dtype} {list(targets.shape)}.")
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias must be [{vocab}], one a row of weight; it is {list(bias.shape)}.")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk is a number of rows, at least 1; it is {chunk!r}.")

    dtype = torch.float32
    for name, tensor in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if tensor is not None:
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{name} must be bfloat16, float16, float32 or float64; it is {tensor.dtype}.")
            dtype = torch.promote_types(dtype, tensor.dtype)
    for name, tensor in {"weight": weight, "targets": targets, "bias": bias, "temperature": temperature}.items():
        if isinstance(tensor, Tensor) and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}: they must be on one device.")

    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; it is {temperature}.")
        return dtype, torch.full((rows,), temperature, dtype=dtype, device=hidden.device)
    if temperature.shape != (rows,) or not temperature.is_floating_point():
        raise ValueError(f"temperature must be a number or a float tensor [{rows}]; it is {temperature.dtype} {list(temperature.shape)}.")
    if temperature.requires_grad:
        raise ValueError("temperature requires grad, but linear_logprob has no gradient for it: detach it.")
    wrong = (~((temperature > 0) & temperature.isfinite())).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"temperature must be positive and finite; for row {row} it is {float(temperature[row])}.")
    return dtype, temperature


def vocabulary(rows: int, start: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """Size of the whole vocabulary: `rows` of the weight from id `start` on are here, the others on the group's other ranks. Collective.

    Raises:
        ValueError: On every rank alike: the vocabulary is empty, or the ranks' shares leave ids out or overlap.
    """
    if group is None:
        if start != 0:
            raise ValueError(f"vocab_start is {start}, but without a group the weight is the whole vocabulary; give the group.")
        shares = [(0, rows)]
    else:
        table = torch.zeros(group.size(), 2, dtype=torch.int64, device=device)
        table[group.rank()] = torch.tensor([start, rows])
        dist.all_reduce(table, group=group)
        shares = [(int(first), int(count)) for first, count in table.tolist()]
    end = 0
    for first, count in sorted(share for share in shares if share[1]):
        if first != end:
            parts = ", ".join(f"[{first}, {first + count})" for first, count in shares)
            raise ValueError(f"the ranks hold the token ids {parts}: each id from 0 to the last must be on one rank. Check vocab_start.")
        end += count
    if end == 0:
        raise ValueError("weight has no rows: the vocabulary is empty.")
    return end


def check_targets(targets: Tensor, vocab: int) -> None:
    """Raise a ValueError if one of the targets int64 [T] is outside the vocabulary [0, `vocab`)."""
    outside = ((targets < 0) | (targets >= vocab)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, V = {vocab}).")
