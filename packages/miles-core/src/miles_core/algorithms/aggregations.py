"""Aggregations: how the rows of one optimizer step add up to its loss, as a weight for each row [N].

A weight depends only on the step's masks, never on the micro-batch, so the loss does not either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import SegmentOps


def token_mean(ops: SegmentOps) -> Tensor:
    """``1 / (trained tokens of the step)`` for every row; 0 if nothing is trained."""
    return torch.full(ops.mask.shape, 1.0 / max(ops.tokens, 1), dtype=torch.float64, device=ops.mask.device)


def sequence_mean(ops: SegmentOps) -> Tensor:
    """Mean over the step's non-empty sequences of the mean over a sequence's trained tokens."""
    return 1.0 / (ops.spread(ops.sequence_tokens).double().clamp(min=1) * max(ops.sequences, 1))
