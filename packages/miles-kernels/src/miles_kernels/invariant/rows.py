"""How many rows a matrix product needs so that each has the same bits in any company, and how to fill them up.

A product adds up in an order that its shape decides. With MKL (AMD and Intel) a row's bits do not depend on how many rows there are, as
long as each thread gets four of them; below that other kernels run.

Functions of single numbers have two forms in torch, one for whole vectors of numbers and one for those left over at the end of a thread's
share, and their last bits differ. With rows of `COLUMNS` nothing is left over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16
"""Least number of rows of a product: four a thread for up to four threads."""

COLUMNS = 128
"""Width of rows of single numbers is a multiple of this: a vector is at most 32 of them, for up to four threads."""


def filled(rows: Tensor, value: float = 0) -> Tensor:
    """[R, ...] with rows of ``value`` behind, so that there are at least `ROWS`."""
    missing = ROWS - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing), value=value) if missing > 0 else rows


def widened(rows: Tensor) -> Tensor:
    """[..., D] with columns of zeros behind, a multiple of `COLUMNS` in all, contiguous."""
    return F.pad(rows, (0, -rows.shape[-1] % COLUMNS)).contiguous()


def enough_for_all(experts: int, top_k: int, device: torch.device) -> Tensor:
    """int64 [R, top_k]: experts for rows beside a batch's own, which bring every expert at least `ROWS` rows, each row's all different."""
    rows = -(-ROWS * experts // top_k)
    return (torch.arange(rows * top_k, device=device) % experts).reshape(rows, top_k)
