"""Log-probability of target tokens and entropy, straight from hidden states and the output projection: the logits are never whole.

    z = (hidden @ weight.T + bias) / temperature        [T, V], only ever a chunk of its rows
    logprob_t = z_t[target_t] − logsumexp(z_t)
    entropy_t = −Σ_i p_i log p_i,  p = softmax(z_t)

The gradient with respect to z recomputes the chunk (as in Liger Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009):

    d logprob / d z_i = [i = target] − p_i
    d entropy / d z_i = −p_i (log p_i + entropy)

This file holds the checks and the autograd; a backend (`reference.py`) holds `forward` and `backward` on plain tensors.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from miles_kernels.registry import backend

__all__ = ["LinearLogprob", "linear_logprob"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class LinearLogprob(NamedTuple):
    """Both [T] and both differentiable; float32, or float64 when an input is float64."""

    logprob: Tensor
    entropy: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> LinearLogprob:
    """log softmax((hidden @ weight.T + bias) / temperature) at `targets`, and the entropy of that same distribution.

    hidden [T, D], weight [V, D] and bias [V] are bfloat16, float16, float32 or float64, and need be neither of one dtype nor contiguous.
    The maths is float32 (float64 if one of them is float64), with autocast or without; a gradient is rounded once, to its input's dtype.
    targets [T] is int64 in [0, V). temperature is a number or a float tensor [T], positive and finite, and gets no gradient.

    chunk is the number of rows of logits whose memory the op may use; results do not depend on it beyond rounding. Without it the backend
    takes what its budget allows (`reference.CHUNK_BYTES`, at least `CHUNK_ROWS`). Extra memory is at most such a chunk of logits, and in
    the backward the gradients themselves (that of weight is summed in the dtype of the maths). A row costs the same when its gradient is
    zero: leave rows that are not wanted out of `hidden`.

    T = 0 gives empty results and zero gradients. Gradients of gradients are not supported. ValueError on a wrong shape, dtype, device or
    value; on an accelerator, looking for values out of range waits for the device.
    """
    dtype, temperatures = _checked(hidden, weight, targets, temperature, bias, chunk)
    return LinearLogprob(
        *_LinearLogprob.apply(hidden, weight, bias, targets, temperatures.to(dtype), chunk, backend("linear_logprob", hidden.device))
    )


def _checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor, bias: Tensor | None, chunk: int | None
) -> tuple[torch.dtype, Tensor]:
    """The dtype of the maths and the temperature as a tensor [T]; ValueError with a sentence on what the op cannot take."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, D] and weight [V, D] with one D; they are {list(hidden.shape)} and {list(weight.shape)}.")
    (rows, _), vocab = hidden.shape, weight.shape[0]
    if vocab == 0:
        raise ValueError("weight has no rows: the vocabulary is empty.")
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

    outside = ((targets < 0) | (targets >= vocab)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, V = {vocab}).")

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


class _LinearLogprob(torch.autograd.Function):
    """`forward` and `backward` of a backend as one differentiable op; keeps its inputs and two [T] vectors, no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor,
        chunk: int | None,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            logprob, entropy, lse = backend.forward(hidden, weight, bias, targets, temperature, chunk)
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, entropy, lse)
        ctx.chunk, ctx.backend = chunk, backend
        ctx.set_materialize_grads(False)  # a result nobody used has gradient None, and its maths is skipped
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            gradients = ctx.backend.backward(*ctx.saved_tensors, dlogprob, dentropy, ctx.needs_input_grad[:3], ctx.chunk)
        return *gradients, None, None, None, None
