"""Weights as SGLang takes them by value over HTTP: tensors flattened into buckets, pickled without pointers, in base64, in JSON.

The pickle holds one tensor of bytes and, for each weight, where it lies in it; only names that SGLang's own restricted unpickler
knows occur in it. Each rank of a server gets the whole bucket and takes its share.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

BUCKET_BYTES = 4 << 20
"""Of weights in one request; measured: larger ones do not stay in the processors' caches, smaller ones cost requests."""

ALIGNMENT = 16
"""Bytes: where a weight may begin, so that it can be seen as numbers of its own type."""


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
        """Copy a weight in; False if there is no room."""
        start = -(-self.used // ALIGNMENT) * ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        if end > len(self.flat):
            return False
        self.flat[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        self.entries.append(
            SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start)
        )
        self.used = end
        return True

    def body(self, ranks: int) -> bytes:
        """The request."""
        flat = self.flat[: self.used].clone() if self.used < len(self.flat) else self.flat  # a view is pickled with all it is a part of
        pickled = pickle.dumps({"flattened_tensor": flat, "metadata": self.entries}, protocol=4)
        encoded = b'"' + base64.b64encode(pickled) + b'"'
        shares = b",".join([encoded] * ranks)
        return b'{"serialized_named_tensors":[' + shares + b'],"load_format":"flattened_bucket","flush_cache":true}'


def buckets(weights: Iterable[tuple[str, Tensor]], size: int = BUCKET_BYTES) -> Iterator[Bucket]:
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
