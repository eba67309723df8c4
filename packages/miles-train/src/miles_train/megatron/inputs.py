"""A micro-batch of packed samples → what the model takes on one rank, and hidden states → what losses get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from miles_core.batch import Batch
from miles_kernels.ops.linear_logprob import linear_logprob

from ..ranks.layout import Layout
from .model import PolicyModel, parallel_state


@dataclass(frozen=True)
class MicroInputs:
    """One micro-batch on one rank: R rows, of which the first ``batch.n_rows`` are real and the others padding.

    R is the same on all context-parallel ranks and divides by the tensor-parallel size.

    Attributes:
        batch: The rows of this context-parallel rank (``Batch.context_shard``), N_local of them; results and losses are over these.
        tokens: int64 [1, R]; 0 in padding.
        positions: int64 [1, R]: index of each row in its sample; 0 in padding.
        mask: What megatron hands to attention as ``attention_mask`` (see ``layers.PackedAttention``).
    """

    batch: Batch
    tokens: Tensor
    positions: Tensor
    mask: Tensor


def padded_rows(batch: Batch, layout: Layout) -> int:
    """R, the rows of a rank for this WHOLE micro-batch: as many as the fullest context-parallel rank has, rounded up."""
    rows = max(len(batch.context_rows(rank, layout.context)) for rank in range(layout.context)) if layout.context > 1 else batch.n_rows
    return -(-rows // layout.tensor) * layout.tensor


def micro_inputs(batch: Batch, layout: Layout, context_rank: int, device: torch.device | str = "cpu") -> MicroInputs:
    """The inputs of one rank from the WHOLE micro-batch (all its rows, ``messages.READS`` loaded); cut here, without communication."""
    rows = padded_rows(batch, layout)
    if layout.context == 1:
        shard = batch
        lengths = [*batch.lengths.tolist(), rows - batch.n_rows]
        mask = torch.tensor([n for n in lengths if n])
    else:
        shard = batch.context_shard(context_rank, layout.context)
        mask = torch.from_numpy(_visible(batch, layout.context, context_rank, rows)).to(device)
    tokens, positions = np.zeros((2, rows), np.int64)
    tokens[: shard.n_rows], positions[: shard.n_rows] = shard.array("tokens"), shard.array("positions")
    return MicroInputs(shard, torch.from_numpy(tokens)[None].to(device), torch.from_numpy(positions)[None].to(device), mask)


def _visible(batch: Batch, size: int, rank: int, rows: int) -> np.ndarray:
    """bool [1, 1, R, size · R]: the same sample, and not later. A padding row is a sample of its own."""
    sample, position = np.arange(-size * rows, 0), np.zeros(size * rows, np.int64)
    for other in range(size):
        held = batch.context_rows(other, size)
        here = slice(other * rows, other * rows + len(held))
        sample[here], position[here] = batch.segment[held], batch.array("positions")[held]
    mine = slice(rank * rows, (rank + 1) * rows)
    return ((sample[mine, None] == sample) & (position[mine, None] >= position))[None, None]


def forward(model: nn.Module, micro: MicroInputs) -> Tensor:
    """The forward pass of a PolicyModel, bare or wrapped in DistributedDataParallel.

    Returns what the pipeline stage gives on: hidden states as the next one takes them, or on the last hidden states [R, H], whole on
    every tensor-parallel rank. Going back, each of these ranks must put in the whole gradient, as ``outputs`` does.
    """
    return model(micro.tokens, micro.positions, micro.mask)


def outputs(model: PolicyModel, hidden: Tensor, micro: MicroInputs, rows: np.ndarray) -> dict[str, Tensor]:
    """What losses get (``LossInputs.outputs``), on the last pipeline stage: ``logprobs`` and ``entropy``, differentiable float32
    [N_local], equal on all tensor-parallel ranks; 0 outside ``rows``.

    Args:
        model: The last stage.
        hidden: [R, H] from ``forward``.
        micro: The same.
        rows: int64, indices into ``micro.batch``'s rows; they predict a token at a positive temperature.
    """
    batch, device = micro.batch, hidden.device
    index = torch.from_numpy(rows).to(device)
    targets = torch.from_numpy(batch.array("targets")[rows].astype(np.int64)).to(device)
    temperatures = torch.from_numpy(batch.array("temperatures")[rows]).to(device)
    weight, start = model.head()
    shared: dict[str, Any] = (
        {"group": parallel_state.get_tensor_model_parallel_group(), "vocab_start": start} if model.layout.tensor > 1 else {}
    )
    result = linear_logprob(hidden.index_select(0, index), weight, targets, temperature=temperatures, **shared)
    return {
        name: x.new_zeros(batch.n_rows).index_copy(0, index, x) for name, x in (("logprobs", result.logprob), ("entropy", result.entropy))
    }
