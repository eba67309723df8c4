"""Attention on a CPU whose every row has the same bits in any company: other rows, other sequences, more keys that it does not see.

Rows of a matrix product do not depend on how many there are once there are some (`rows.py`), and columns never do; what remains is the
length of the sum over keys, which MKL cuts in ways that depend on it. So here

- queries are at least `ROWS` rows, filled up with zeros,
- heads are widened to a multiple of `WIDTH`,
- the sum over keys is made in blocks of `BLOCK`, filled up with zeros, one after another: a block that a row does not see adds exactly 0,

and softmax is torch's, whose lanes get zeros where there are more keys. Heads that share a key head are its query rows.

That a machine keeps this is checked where it matters: by whoever promises equal bits, with its own model, at its start.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import ROWS

BLOCK = 64
"""Keys that are summed over at a time."""

WIDTH = 16
"""Heads are as wide as a multiple of this: the last columns of other widths go through kernels of their own."""


def invariant_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale · query @ keyᵀ + mask) @ value, differentiable.

    Args:
        query: [n, heads, S, D].
        key, value: [n, heads_kv, L, D]; heads is a multiple of heads_kv. Values of keys that nobody sees must be finite.
        mask: [n or 1, 1, S, L] in the dtype of the scores: 0 where a query sees a key, the dtype's least number where it does not.
        scale: Of the scores.

    Returns:
        [n, heads, S, D].
    """
    n, heads, length, width = query.shape
    kv = key.shape[1]
    grouped = query.reshape(n, kv, heads // kv, length, width)
    seen = mask[:, :, None].expand(n, kv, heads // kv, length, mask.shape[-1])
    rows, keys = heads // kv * length, key.shape[2]
    short, open_, narrow = max(0, ROWS - rows), -keys % BLOCK, -width % WIDTH
    flat = F.pad((grouped * scale).reshape(n * kv, rows, width), (0, narrow, 0, short))
    key, value = (F.pad(x.reshape(n * kv, keys, width), (0, narrow, 0, open_)) for x in (key, value))
    least = torch.finfo(query.dtype).min
    hidden = F.pad(seen.reshape(n * kv, rows, keys), (0, open_, 0, short), value=least)
    weights = torch.softmax(torch.bmm(flat, key.transpose(1, 2)) + hidden, dim=-1)
    out = torch.bmm(weights[..., :BLOCK], value[:, :BLOCK])
    for start in range(BLOCK, keys + open_, BLOCK):
        out = out + torch.bmm(weights[..., start : start + BLOCK], value[:, start : start + BLOCK])
    return out[:, :rows, :width].reshape(n, kv, heads // kv, length, width).reshape(n, heads, length, width)
