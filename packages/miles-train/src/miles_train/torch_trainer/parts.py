"""Tensors of which each rank holds a part (torch's DTensor, as FSDP2 makes them) and tensors that are here as a whole, in one way."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this rank may hold a part. Collective if it does."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which every rank has, what a rank keeps that holds ``like``, on its device; without communication."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
