"""Aggregations: how the rows of one optimizer step add up to its loss, as a weight for each row: float64 [N].

A weight depends only on the step's masks, never on the micro-batch, so the loss does not either. Sequences and trajectories that
train nothing count nowhere: means run over the non-empty ones. Where nothing at all is trained, the loss is 0. Rows outside the
mask have some finite weight, which ``SegmentOps.share`` leaves out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import SegmentOps


def token_mean(ops: SegmentOps) -> Tensor:
    """Mean over the step's trained tokens: ``1 / tokens``. Long answers weigh more (DAPO, Yu et al. 2025, arXiv:2503.14476)."""
    return _constant(ops, 1.0 / max(ops.tokens, 1))


def token_sum(ops: SegmentOps) -> Tensor:
    """Sum over the step's trained tokens: 1. The size of the gradient grows with the batch and its answers."""
    return _constant(ops, 1.0)


def sequence_mean(ops: SegmentOps) -> Tensor:
    """Mean over sequences of the mean over a sequence's tokens (GRPO, Shao et al. 2024, arXiv:2402.03300; "seq-mean-token-mean").

    ``1 / (tokens of the row's sequence · sequences)``.
    """
    return 1.0 / (ops.spread(ops.sequence_tokens).double().clamp(min=1) * max(ops.sequences, 1))


def sequence_mean_token_sum(ops: SegmentOps) -> Tensor:
    """Mean over sequences of the sum over a sequence's tokens ("seq-mean-token-sum"): ``1 / sequences``."""
    return _constant(ops, 1.0 / max(ops.sequences, 1))


def trajectory_mean(ops: SegmentOps) -> Tensor:
    """Mean over trajectories of the mean over a trajectory's tokens, whichever of its samples hold them.

    ``1 / (tokens of the row's trajectory · trajectories)``. The same as ``sequence_mean`` where every trajectory is one sample;
    where some have branches, retries or compacted contexts, a trajectory still weighs once.
    """
    return 1.0 / (ops.spread(ops.trajectory_tokens).double().clamp(min=1) * max(ops.trajectories, 1))


def constant(ops: SegmentOps, *, length: int) -> Tensor:
    """Dr.GRPO (Liu et al. 2025, arXiv:2503.20783): ``1 / (sequences · length)`` with a fixed length, so that no answer's own counts.

    As verl's "seq-mean-token-sum-norm", whose length is the padded width unless one is given, and TRL's "dr_grpo" with its longest
    completion (which counts empty sequences too).
    """
    return _constant(ops, 1.0 / (max(ops.sequences, 1) * length))


def _constant(ops: SegmentOps, weight: float) -> Tensor:
    return torch.full(ops.mask.shape, weight, dtype=torch.float64, device=ops.mask.device)
