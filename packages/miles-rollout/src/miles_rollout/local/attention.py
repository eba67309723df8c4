"""Attention of the local engine: grouped queries without copies of the keys, at one query a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "miles_slots"


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in the form of transformers' attention functions.

    With one query a row (decoding) the heads that share a key head become its query rows, so that neither keys nor values are
    repeated, which is most of what decoding costs; otherwise sdpa does it.

    Args:
        module: The attention layer.
        query: [n, heads, S, head_dim].
        key, value: [n, heads_kv, L, head_dim].
        attention_mask: Additive, [n, 1, S, L].
        scaling: Of the scores; 1 / √head_dim by default.
        kwargs: What sdpa takes.

    Returns:
        [n, S, heads, head_dim].
    """
    if query.shape[2] > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    n, heads, _, head_dim = query.shape
    grouped = query.reshape(n, key.shape[1], heads // key.shape[1], head_dim)
    scores = (grouped * (head_dim**-0.5 if scaling is None else scaling)) @ key.transpose(2, 3) + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(n, 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, slot_attention)
