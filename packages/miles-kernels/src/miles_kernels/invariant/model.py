"""A transformers model whose numbers for a token have the same bits however sequences are batched: prefilled, decoded, trained.

What depends on a batch's shape are matrix products, activations and attention; norms and rotary positions go row by row as they are. So
every linear layer, router and expert gets enough rows and every activation whole vectors (`rows.py`), and attention is ours
(`attention.py`). Needs `transformers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.masking_utils import eager_mask

from .attention import BLOCK, invariant_attention
from .rows import ROWS, enough_for_all, filled, widened

NAME = "miles_invariant"

COMPANIES = (("fewer sequences", 3, 40), ("shorter sequences", 24, 17), ("a single short sequence", 1, 5), ("one token", 1, 1))
"""What is compared: a name, how many sequences, how long."""

ACTIVATIONS = tuple({cls if isinstance(cls, type) else cls[0] for cls in ACT2CLS.values()})
"""Classes of the modules that configurations name as ``hidden_act``."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """In the form of transformers' attention functions. Raises ValueError where a layer wants more than scaled dot products."""
    if more := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} has attention with {', '.join(more)}, not plain scaled dot products")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return invariant_attention(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


def make_invariant(model: PreTrainedModel, routers: Sequence[nn.Module] = ()) -> None:
    """Change a model in place so that its numbers keep their bits in any company. Call it before other hooks are put on routers.

    Its attention takes additive masks [n, 1, S, L], and sequences must begin at the first key: padded on the right, or in slots.

    Args:
        model: Of a causal language model whose attention is plain scaled dot products.
        routers: Modules that choose experts for rows [R, hidden]; empty for dense models.
    """
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if isinstance(module, nn.Linear) or module in routers:
            _Filled(module)
        elif isinstance(module, ACTIVATIONS):
            _Widened(module)
        elif hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # transformers' mark of fused experts
            _FilledExperts(module)
    if routers:
        model.set_experts_implementation("eager")


@torch.no_grad()
def first_difference(model: PreTrainedModel, vocab_size: int) -> str | None:
    """What company changes in the hidden states of such a model, in words; None if nothing does. Takes well under a second for small ones.

    Random tokens, [24, 40], and two sequences that reach into a third block of keys, are compared with themselves in fewer rows, cut
    shorter, and one at a time.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (24, 40), generator=generator).to(model.device)
    longest = min(2 * BLOCK + 5, getattr(model.config.get_text_config(), "max_position_embeddings", 2 * BLOCK + 5))
    long = torch.randint(vocab_size, (2, longest), generator=generator).to(model.device)

    def hidden(part: Tensor) -> Tensor:
        return model.base_model(part, attention_mask=torch.ones_like(part), use_cache=False).last_hidden_state

    whole = hidden(tokens)
    for what, n, length in COMPANIES:
        if not torch.equal(hidden(tokens[:n, :length]), whole[:n, :length]):
            return f"a token's hidden state has other bits among {what} ({torch.get_num_threads()} threads)"
    shorter = longest // 2 + 7
    if not torch.equal(hidden(long[:1, :shorter]), hidden(long)[:1, :shorter]):
        return f"a token's hidden state has other bits in a longer sequence ({torch.get_num_threads()} threads)"
    return None


class _Filled:
    """Gives a module that works on rows [..., D] at least `ROWS` of them."""

    def __init__(self, module: nn.Module) -> None:
        self._shape: torch.Size | None = None
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs:
            raise ValueError(f"{type(module).__name__} is called without positional arguments")
        rows = inputs[0]
        self._shape = rows.shape[:-1] if rows.shape[:-1].numel() < ROWS else None
        return None if self._shape is None else (filled(rows.reshape(-1, rows.shape[-1])), *inputs[1:])

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self._shape is None:
            return None
        count = self._shape.numel()
        if isinstance(output, tuple):
            return tuple(part[:count] for part in output)
        return output[:count].reshape(*self._shape, output.shape[-1])


class _Widened:
    """Gives a module that works on single numbers [..., D] whole vectors of them."""

    def __init__(self, module: nn.Module) -> None:
        self._width = 0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self._width = inputs[0].shape[-1]
        return (widened(inputs[0]),)

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[..., : self._width]


class _FilledExperts:
    """Gives every expert of a layer at least `ROWS` rows; forward(hidden [R, D], experts [R, K], weights [R, K])."""

    def __init__(self, module: nn.Module) -> None:
        self._rows = 0
        self._experts: int = module.num_experts  # ty: ignore[invalid-assignment]
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(inputs) != 3:
            raise ValueError(f"{type(module).__name__} is not called with (hidden states, experts, weights)")
        hidden, chosen, weights = inputs
        self._rows = len(hidden)
        more = enough_for_all(self._experts, chosen.shape[1], hidden.device).to(chosen.dtype)
        zeros = [x.new_zeros(len(more), x.shape[1]) for x in (hidden, weights)]
        return torch.cat([hidden, zeros[0]]), torch.cat([chosen, more]), torch.cat([weights, zeros[1]])

    def _after(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[: self._rows]
