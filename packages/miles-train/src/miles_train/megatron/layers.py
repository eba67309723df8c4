"""The modules of a transformer layer that megatron-core leaves to us, and the specs that put them in. No Transformer Engine.

A micro-batch is ONE sequence of packed rows, [R, 1] in megatron's order; samples are kept apart by the attention mask, and a row
turns by its own position. So every other module of megatron is used as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bridge

bridge.install()

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add  # noqa: E402
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules  # noqa: E402
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # the router asks whether it is None, but without Transformer Engine it is not even that


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation, with the mark that makes megatron add up its gradient over sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs: Any) -> None:
        super().__init__(
            hidden_size, eps, dtype=config.params_dtype, device=torch.cuda.current_device() if torch.cuda.is_available() else None
        )
        self.weight.sequence_parallel = config.sequence_parallel  # ty: ignore[missing-attribute]


class PackedAttention(nn.Module):
    """Causal attention within each sample of a packed sequence, by torch's scaled_dot_product_attention.

    The ``attention_mask`` that megatron hands on is one of two things, told apart by their dtype:

    - int64 [S], on the CPU: rows of each sample, which follow one another. Attention is computed sample by sample. Padding is
      a last sample that nothing is asked of.
    - bool [1, 1, R, cp · R]: under context parallelism, which rows of all ranks (in the order of ranks) each row here sees.
      Keys and values are gathered from the group; padding sees itself.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__()
        self._group = pg_collection.cp
        self._grouped = config.num_attention_heads != config.num_query_groups

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """query [R, 1, heads, D], key and value [R, 1, groups, D] → [R, 1, heads · D]."""
        if attention_mask.dtype == torch.bool:
            key, value = (gather_from_sequence_parallel_region(x.contiguous(), True, self._group) for x in (key, value))
            result = self._attend(query, key, value, attn_mask=attention_mask)
        else:
            lengths = attention_mask.tolist()
            parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            result = torch.cat([self._attend(q, k, v, is_causal=True) for q, k, v in parts])
        return result.flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        """[L, 1, heads, D] → the same."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self._grouped, **mask).permute(2, 0, 1, 3)


NORM: Any = RMSNorm  # megatron's annotations want a ModuleSpec where it takes any callable
ATTENTION: Any = PackedAttention
ADD: Any = get_bias_dropout_add


def block_spec(config: TransformerConfig, first_layer: int, layers: int) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage, from index ``first_layer`` of the whole model, and the norm after the last."""
    moe = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    assert isinstance(moe, list)
    specs = [_layer_spec(config.num_moe_experts if moe[i] else None) for i in range(first_layer, first_layer + layers)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=NORM)


def _layer_spec(experts: int | None) -> ModuleSpec:
    if experts:
        mlp = get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)
    else:
        mlp = ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=ATTENTION,
        linear_proj=RowParallelLinear,
        q_layernorm=NORM,
        k_layernorm=NORM,
    )
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=NORM,
            self_attention=ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.arbitrary}, submodules=attention),
            self_attn_bda=ADD,
            pre_mlp_layernorm=NORM,
            mlp=mlp,
            mlp_bda=ADD,
        ),
    )
