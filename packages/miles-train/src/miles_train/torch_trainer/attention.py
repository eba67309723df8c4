"""Attention over rows that stand once: samples are laid out side by side for sdpa only, the rest of the model sees each row once."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "miles_rows"
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of attention layers (transformers' ``layer_types``) that ``row_attention`` stands in for."""


class Blocks(NamedTuple):
    """Where samples stand among the rows of a forward pass.

    Attributes:
        rows: int64 [S, L] each, for samples of similar length: the row that is token p of sample s; anything behind a sample's end.
        places: int64 [N], for each row one place in the flattened ``rows``, end to end, where it stands.
    """

    rows: tuple[Tensor, ...]
    places: Tensor


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    blocks: Blocks | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal scaled dot-product attention in the form of transformers' attention functions.

    Right padding needs no mask: no real token looks ahead. Gathering is ``F.embedding``, whose gradient is summed in a fixed order.

    Args:
        module: The attention layer.
        query: [1, heads, N, head_dim], or [B, heads, T, head_dim] without ``blocks``.
        key, value: The same with the key heads.
        attention_mask: None; transformers makes no mask for an attention of another's.
        blocks: Which rows make up which sample; None: each of the B is one.
        sliding_window: How many tokens back a token sees, itself counted.
        kwargs: What sdpa takes.

    Returns:
        [1, N, heads, head_dim], or [B, T, heads, head_dim].
    """
    if attention_mask is not None:
        raise ValueError("row_attention makes its own masks, but was given one")
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, _window(query, sliding_window), **kwargs)
    n, head_dim = query.shape[2:]
    flat = [x.transpose(1, 2).reshape(n, -1) for x in (query, key, value)]
    outputs = []
    for rows in blocks.rows:
        q, k, v = (F.embedding(rows, x).unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in flat)
        output, _ = sdpa_attention_forward(module, q, k, v, _window(q, sliding_window), **kwargs)
        outputs.append(output.reshape(rows.numel(), -1))
    return F.embedding(blocks.places, torch.cat(outputs)).view(1, n, -1, head_dim), None


def _window(query: Tensor, size: int | None) -> Tensor | None:
    """bool [1, 1, T, T]: token i sees itself and the size − 1 before it; None where that is everything before it."""
    length = query.shape[2]
    if size is None or length <= size:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - size)[None, None]


def can_stand_in(model: PreTrainedModel) -> bool:
    """Whether ``row_attention`` computes what the model's own attention does, as far as its config tells: sdpa, perhaps windowed."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or KNOWN_LAYERS)
    return config._attn_implementation == "sdpa" and kinds <= KNOWN_LAYERS and getattr(config, "attention_chunk_size", None) is None


@contextmanager
def windows_of_at_most(size: int, model: PreTrainedModel) -> Generator[None]:
    """Meanwhile the model's sliding windows are no wider: in its masks (made from the config) and its layers (which pass them on)."""
    holders: dict[int, Any] = {id(x): x for module in model.modules() for x in (module, getattr(module, "config", None))}
    found = [(x, x.sliding_window) for x in holders.values() if isinstance(getattr(x, "sliding_window", None), int)]
    try:
        for holder, own in found:
            holder.sliding_window = min(size, own)
        yield
    finally:
        for holder, own in found:
            holder.sliding_window = own


AttentionInterface.register(NAME, row_attention)
