"""One decoding step of a dense decoder of Llama's shape in as few operations as there are, over the memory of its own modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from miles_core.adapters import NAME
from miles_kernels.registry import backend

from .cache import SlotCache


@dataclass(frozen=True)
class Family:
    """How models of a ``model_type`` differ from Llama (biases are seen on the modules).

    Attributes:
        head_norms: Queries and keys are normalised head by head before they are rotated.
    """

    head_norms: bool = False


FAMILIES = {"llama": Family(), "mistral": Family(), "qwen2": Family(), "qwen3": Family(head_norms=True)}
"""Models that the step below is the decoding step of. All others run as modules."""


@dataclass(frozen=True)
class Up:
    """One of several adapters side by side: ``weight`` [rank, out] times ``scale``, from its ``inner`` columns to its ``outer`` ones."""

    weight: Tensor
    scale: float
    inner: slice
    outer: slice


@dataclass(frozen=True)
class Adapters:
    """Low-rank parts of linear layers side by side: ``down`` [in, sum of ranks] is one product for all of them."""

    down: Tensor
    ups: tuple[Up, ...]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add to [n, out] in place."""
        low = torch.mm(x, self.down)
        for up in self.ups:
            y[:, up.outer].addmm_(low[:, up.inner], up.weight, alpha=up.scale)


@dataclass(frozen=True)
class Linear:
    """``weight`` [out, in] and ``bias`` [out] of a linear layer, or of several side by side, and what adapters add to them.

    ``form`` is the backend of ``miles_kernels.ops.linear`` that multiplies.
    """

    weight: Tensor
    bias: Tensor | None
    adapters: Adapters | None
    form: ModuleType

    def __call__(self, x: Tensor) -> Tensor:
        """[n, out]."""
        y = self.form.product(x, self.weight, self.bias)
        if self.adapters is not None:
            self.adapters.add_to(y, x)
        return y

    def added(self, residual: Tensor, x: Tensor) -> Tensor:
        """``residual`` [n, out], which may be overwritten, and this of ``x``."""
        y = self.form.added(residual, x, self.weight, self.bias)
        if self.adapters is not None:
            self.adapters.add_to(y, x)
        return y


@dataclass(frozen=True)
class Layer:
    """The weights of a layer; all of them are the modules' own memory. ``head_norms``: [2, head_dim], of queries and of keys."""

    attention_norm: nn.Module
    qkv: Linear
    head_norms: Tensor | None
    output: Linear
    mlp_norm: nn.Module
    gate_up: Linear
    activation: Callable[[Tensor], Tensor]
    down: Linear
    scaling: float
    epsilon: float


class FusedStep:
    """Decoding of n rows, one token each, that are in the first n slots of the cache.

    Queries, keys and values come out of one matrix product, as do both halves of the MLP. Their weights lie in one tensor, and the
    modules' parameters are made views of its parts: what is written to one is read by the other, and nothing is held twice.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        config = model.config
        decoder: Any = model.base_model
        self._heads: int = config.num_attention_heads
        self._heads_kv: int = config.num_key_value_heads
        self._embedding: Tensor = decoder.embed_tokens.weight
        self._layers = [_layer(layer, family) for layer in decoder.layers]
        self._rotary: nn.Module = decoder.rotary_emb
        self._kinds = torch.tensor([0] * self._heads + [1] * self._heads_kv, device=model.device)
        self._zero = self._embedding.new_zeros(())
        self._lowest = torch.full_like(self._zero, torch.finfo(model.dtype).min)  # not −∞, which gives NaN where nothing is seen
        self._size = (0, 0)
        self._norm: nn.Module = decoder.norm
        self._head = _fused(model.get_output_embeddings())

    def __call__(self, cache: SlotCache, tokens: Tensor, positions: Tensor, length: int, wanted: Tensor | None) -> Tensor:
        """Run a token of each row; its keys and values go to the cache.

        Args:
            cache: Its slots 0 … n − 1 hold the rows.
            tokens: int64 [n].
            positions: int64 [n]. A token sees all positions up to its own.
            length: Positions that attention looks at: the largest of ``positions`` + 1.
            wanted: int64 [m], rows whose logits are wanted; None: all.

        Returns:
            Logits [m, V].
        """
        n, rows = len(tokens), _rounded(len(tokens))
        self._prepare(cache)
        cos, sin = self._rotations.index_select(0, positions)[:, None].chunk(2, dim=2)
        by_head = positions.repeat_interleave(self._heads_kv)
        mask = torch.where(self._columns[:length] > by_head[:, None, None], self._lowest, self._zero)
        written = self._starts[: len(by_head)] + by_head
        hidden = F.embedding(_filled(tokens, rows), self._embedding)
        head_dim = cos.shape[2]
        attended = hidden.new_zeros(rows, self._heads * head_dim)
        by_key_head = attended[:n].view(len(written), -1, head_dim)
        for layer, (keys, values) in zip(self._layers, cache.held(), strict=True):
            query, key, value = self._project(layer, hidden, cos, sin)
            keys.view(-1, head_dim).index_copy_(0, written, key.reshape(-1, head_dim))
            values.view(-1, head_dim).index_copy_(0, written, value.reshape(-1, head_dim))
            # The heads that share a key head are its query rows, so that neither keys nor values are repeated.
            query = query.reshape(by_key_head.shape)
            seen_keys, seen_values = keys[: len(written), :length], values[: len(written), :length]
            scores = torch.baddbmm(mask, query, seen_keys.transpose(1, 2), alpha=layer.scaling)
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
            torch.bmm(weights, seen_values, out=by_key_head)
            hidden = layer.output.added(hidden, attended)
            gate, up = layer.gate_up(_normed(layer.mlp_norm, hidden)).chunk(2, dim=1)
            hidden = layer.down.added(hidden, layer.activation(gate).mul_(up))
        if wanted is not None:
            n = len(wanted)
            hidden = hidden.index_select(0, _filled(wanted, _rounded(n)))
        return self._head(_normed(self._norm, hidden))[:n]

    def _project(self, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [n, heads, head_dim], keys and values [n, heads_kv, head_dim]; the former two normalised and rotated.

        ``cos`` and ``sin`` are [n, 1, head_dim]; ``hidden`` may have more rows.
        """
        n, _, head_dim = cos.shape
        projected = layer.qkv(_normed(layer.attention_norm, hidden))[:n].view(n, -1, head_dim)
        turning, value = projected.split((self._heads + self._heads_kv, self._heads_kv), dim=1)
        if layer.head_norms is not None:
            turning = F.rms_norm(turning, (head_dim,), None, layer.epsilon).mul_(layer.head_norms.index_select(0, self._kinds))
        turned = (turning * cos).add_(turning.contiguous().roll(head_dim // 2, dims=2).mul_(sin))
        query, key = turned.split((self._heads, self._heads_kv), dim=1)
        return query, key, value

    def _prepare(self, cache: SlotCache) -> None:
        """What depends only on the size of the cache, when that has changed.

        ``_rotations`` [positions, 2 · head_dim]: cosines, and sines with the sign of the half that they are multiplied with;
        ``_starts`` [slots · heads_kv]: rows of a layer's cache, seen as [slots · heads_kv · positions, head_dim], where a head begins.
        """
        if self._size == (cache.n_slots, cache.length):
            return
        self._size = (cache.n_slots, cache.length)
        device = self._embedding.device
        self._columns = torch.arange(cache.length, device=device)
        self._starts = torch.arange(cache.n_slots * self._heads_kv, device=device) * cache.length
        cos, sin = self._rotary(self._embedding, self._columns[None])
        sin[..., : sin.shape[2] // 2].neg_()
        self._rotations = torch.cat([cos[0], sin[0]], dim=1)


def _rounded(n: int) -> int:
    """Rows that are multiplied: 1, 2, 4, 8, 16, 32, 48, 64 … A multiplication is prepared once for each number of rows."""
    return -(-n // 16) * 16 if n > 8 else 1 << max(0, n - 1).bit_length()


def _filled(numbers: Tensor, rows: int) -> Tensor:
    """[n] → [rows], zeros behind."""
    return numbers if len(numbers) == rows else F.pad(numbers, (0, rows - len(numbers)))


def fused_step(model: PreTrainedModel) -> FusedStep | None:
    """The fused step of a model, or None where its ``model_type`` is not one of ``FAMILIES``."""
    family = FAMILIES.get(model.config.model_type)
    return None if family is None else FusedStep(model, family)


def _layer(module: Any, family: Family) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        attention_norm=module.input_layernorm,
        qkv=_fused(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=_joined([attention.q_norm.weight, attention.k_norm.weight]).view(2, -1) if family.head_norms else None,
        output=_fused(attention.o_proj),
        mlp_norm=module.post_attention_layernorm,
        gate_up=_fused(mlp.gate_proj, mlp.up_proj),
        activation=mlp.act_fn,
        down=_fused(mlp.down_proj),
        scaling=attention.scaling,
        epsilon=module.input_layernorm.variance_epsilon,
    )


def _fused(*modules: Any) -> Linear:
    """The weights of linear modules side by side; the modules' parameters become views of them."""
    bias = None if modules[0].bias is None else _joined([m.bias for m in modules])
    weight = _joined([m.weight for m in modules])
    return Linear(weight, bias, _adapters(modules), backend("linear", weight.device))


def _adapters(modules: Sequence[Any]) -> Adapters | None:
    """Of PEFT's modules; None where none of them is one."""
    having, ends = [], list(accumulate(len(m.weight) for m in modules))
    for module, end in zip(modules, ends, strict=True):
        if hasattr(module, "lora_A"):
            having.append((module, slice(end - len(module.weight), end)))
    if not having:
        return None
    down, ups, rank = _joined([m.lora_A[NAME].weight for m, _ in having]).t(), [], 0
    for module, outer in having:
        up = module.lora_B[NAME].weight.detach().t()
        ups.append(Up(up, module.scaling[NAME], slice(rank, rank + len(up)), outer))
        rank += len(up)
    return Adapters(down, tuple(ups))


def _joined(parameters: list[nn.Parameter]) -> Tensor:
    if len(parameters) == 1:
        return parameters[0].detach()
    joined = torch.cat([p.detach() for p in parameters])
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
