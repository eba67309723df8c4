"""Digests of weights: how two ends know that they hold the same. Torch is loaded when they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def digests(weights: Iterable[tuple[str, Tensor]]) -> list[tuple[str, str]]:
    """(name, blake2b over name, dtype, shape and bytes) of each weight, in the order given."""
    return [(name, _digest(name, tensor)) for name, tensor in weights]


def checksum(weights: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of all of them, in the order given."""
    return hashlib.blake2b("|".join(digest for _, digest in digests(weights)).encode(), digest_size=16).hexdigest()


def _digest(name: str, tensor: Tensor) -> str:
    import torch

    digest = hashlib.blake2b(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
