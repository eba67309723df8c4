"""Weights as SGLang takes them by value: tensors flattened into buckets, for HTTP pickled without pointers, in base64, in JSON.

The pickle holds one tensor of bytes and, for each weight, where it lies in it; only names that SGLang's own restricted unpickler
knows occur in it. Each rank of a server gets the whole bucket and takes its share.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pybase64
import torch
from torch import Tensor

PIECE_BYTES = 192 << 10
"""Of a bucket that are encoded and handed to the connection at a time; a multiple of three, so that what base64 makes of them adds up."""

START, BETWEEN, END = b'{"serialized_named_tensors":["', b'","', b'"],"load_format":"flattened_bucket","flush_cache":true}'
"""The JSON around and between the ranks' shares."""


@dataclass
class Bucket:
    """Some weights, one after another.

    Attributes:
        flat: uint8 [capacity], their bytes.
        entries: What SGLang's ``FlattenedTensorMetadata`` holds, one for each weight.
        used: Bytes of ``flat`` in use.
    """

    flat: Tensor
    entries: list[SimpleNamespace] = field(default_factory=list)
    used: int = 0

    def add(self, name: str, tensor: Tensor) -> bool:
        """Copy a weight in; False if there is no room, or none where it could be seen as numbers of its own type."""
        start = self.used
        end = start + tensor.numel() * tensor.element_size()
        if end > len(self.flat) or start % tensor.element_size():
            return False
        self.flat[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        self.entries.append(
            SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start)
        )
        self.used = end
        return True

    def request(self) -> Request:
        """What carries it."""
        return Request(pickle.dumps({"flattened_tensor": _Pickled(self.flat[: self.used]), "metadata": self.entries}, protocol=4))


@dataclass(frozen=True)
class Request:
    """The body of a request that carries a bucket, encoded while it is sent: the whole of it never exists."""

    pickled: bytes

    def length(self, ranks: int) -> int:
        """Bytes of the body for a server of so many ranks."""
        return len(START) + ranks * (4 * -(-len(self.pickled) // 3)) + (ranks - 1) * len(BETWEEN) + len(END)

    async def pieces(self, ranks: int) -> AsyncIterator[bytes]:
        """The body for a server of so many ranks, each of which gets all of the bucket."""
        yield START
        for rank in range(ranks):
            if rank:
                yield BETWEEN
            for start in range(0, len(self.pickled), PIECE_BYTES):
                yield pybase64.b64encode(self.pickled[start : start + PIECE_BYTES])
        yield END


class _Pickled:
    """Pickles as the tensor of bytes [n] that it is made of. torch's own way copies the bytes three times more."""

    def __init__(self, flat: Tensor) -> None:
        self._bytes = flat.numpy().data

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        size = len(self._bytes)
        return torch._utils._rebuild_tensor_v2, (_Storage(self._bytes), 0, (size,), (1,), False, OrderedDict())


class _Storage:
    """The storage of such a tensor."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return torch.storage._load_from_bytes, (b"".join((_before(len(self._data)), self._data)),)


@lru_cache(64)
def _before(size: int) -> bytes:
    """What torch.save writes of a storage of so many bytes before the bytes themselves."""
    empty = torch.storage.TypedStorage(
        wrap_storage=torch.empty(size, dtype=torch.uint8).untyped_storage(), dtype=torch.uint8, _internal=True
    )
    saved: bytes = empty.__reduce__()[1][0]
    return saved[: len(saved) - size]


def buckets(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[Bucket]:
    """The weights in buckets of up to ``size`` bytes, in order; a larger weight is one by itself."""
    bucket = Bucket(torch.empty(size, dtype=torch.uint8))
    for name, tensor in weights:
        if bucket.add(name, tensor):
            continue
        if bucket.entries:
            yield bucket
        bucket = Bucket(torch.empty(max(size, tensor.numel() * tensor.element_size()), dtype=torch.uint8))
        bucket.add(name, tensor)
    if bucket.entries:
        yield bucket
