"""Log-probability of target tokens and entropy, straight from hidden states and the output projection: the logits are never whole.

    z = (hidden @ weight.T + bias) / temperature        [T, V], only ever a chunk of its rows
    logprob_t = z_t[target_t] − logsumexp(z_t)
    entropy_t = −Σ_i p_i log p_i,  p = softmax(z_t)

The gradient with respect to z recomputes the chunk (as in Liger Kernel, arXiv 2410.10989, and Cut Cross-Entropy, arXiv 2411.09009):

    d logprob / d z_i = [i = target] − p_i
    d entropy / d z_i = −p_i (log p_i + entropy)

This file holds the autograd; a backend (`reference.py`) holds `forward` and `backward` on plain tensors, `checks.py` the refusals.

Split over the vocabulary (`group`), rank r has the rows V_r of the weight. With m_r, s_r, e_r the largest logit, Σ exp(z_i − m_r) and
Σ exp(z_i − m_r)(z_i − m_r) over V_r, and m = max m_r, f_r = exp(m_r − m):

    logsumexp = m + log Σ_r f_r s_r
    entropy = log Σ_r f_r s_r − Σ_r f_r (e_r + (m_r − m) s_r) / Σ_r f_r s_r

so that [T] numbers travel and never logits. Tensor-parallel ranks compute the same loss of the same results: dlogprob and dentropy are
equal on all of them, each computes d loss / d z over V_r from these, and d hidden = Σ_r (d loss / d z_{V_r}) @ weight_r.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from miles_kernels.registry import backend

from .checks import check_arguments, check_targets, vocabulary
from .reference import exponentials, logprob_of_logits

__all__ = ["LinearLogprob", "exponentials", "linear_logprob", "logprob_of_logits"]


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
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
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

    With `group`, each of its ranks holds some rows of the weight (and of the bias): those of the token ids from `vocab_start` on. Together
    they are the vocabulary; shares need not be equal and may be empty. hidden, targets (ids of the whole vocabulary) and temperature
    are the same on all ranks, and so are the results. Forward and backward are collectives: 4 T numbers are all-reduced, and a few that
    tell where the shares lie; then the gradient of hidden. That gradient is complete on every rank, so the caller must not reduce it
    again; the gradient of weight is that of the rank's own rows. Both are right where every rank computes the same loss from the same
    results, as tensor-parallel ranks do. `chunk` may differ from rank to rank. Ranks that do not all come wait for the group's timeout.
    """
    dtype, temperatures = check_arguments(hidden, weight, targets, temperature, bias, chunk)
    check_targets(targets, vocabulary(len(weight), vocab_start, group, hidden.device))
    local = targets - vocab_start if vocab_start else targets
    form = backend("linear_logprob", hidden.device)
    return LinearLogprob(*_LinearLogprob.apply(hidden, weight, bias, local, temperatures.to(dtype), chunk, form, group))


def _complete(
    largest: Tensor, total: Tensor, weighted: Tensor, target: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """logprob, entropy and logsumexp [T] from the contributions of all ranks (see `reference.forward`)."""
    if group is not None:
        own = largest
        dist.all_reduce(largest := own.clone(), dist.ReduceOp.MAX, group=group)
        shift = torch.where(own.isneginf(), 0.0, own - largest)  # a rank without rows contributes zeros
        factor = shift.exp()
        sums = torch.stack([factor * total, factor * (weighted + shift * total), target])
        dist.all_reduce(sums, group=group)
        total, weighted, target = sums
    log_total = total.log()
    return target - largest - log_total, log_total - weighted / total, largest + log_total


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
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            logprob, entropy, lse = _complete(*backend.forward(hidden, weight, bias, targets, temperature, chunk), group)
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, entropy, lse)
        ctx.chunk, ctx.backend, ctx.group = chunk, backend, group
        ctx.set_materialize_grads(False)  # a result nobody used has gradient None, and its maths is skipped
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprob: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, temperature = ctx.saved_tensors[0], ctx.saved_tensors[4]
        dtype = hidden.dtype if ctx.group is None else temperature.dtype  # parts are added before they are rounded
        with torch.autocast(hidden.device.type, enabled=False):
            dhidden, dweight, dbias = ctx.backend.backward(
                *ctx.saved_tensors, dlogprob, dentropy, ctx.needs_input_grad[:3], ctx.chunk, dtype
            )
        if ctx.group is not None and dhidden is not None:
            dist.all_reduce(dhidden, group=ctx.group)
            dhidden = dhidden.to(hidden.dtype)
        return dhidden, dweight, dbias, None, None, None, None, None
