"""The tables of Qwen3, dense and with experts. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .specs import Field, ModelSpec, Weight, only


def _all_full(value: Sequence[str] | None, config: Mapping[str, Any]) -> None:
    if other := sorted(set(value or ()) - {"full_attention"}):
        raise ValueError(f"has {other[0]!r} layers")


def _rope_base(value: Any, config: Mapping[str, Any]) -> float:
    if not isinstance(value, dict) or "rope_theta" not in value:
        raise ValueError(f"is {value!r}, without a rope_theta")
    if value.get("rope_type", "default") != "default" or set(value) - {"rope_type", "rope_theta"}:
        raise ValueError(f"asks for scaled or partial rotary embeddings ({value})")
    return float(value["rope_theta"])


def _moe_layers(step: int, config: Mapping[str, Any]) -> list[int]:
    dense = config.get("mlp_only_layers") or []
    return [int(layer not in dense and (layer + 1) % step == 0) for layer in range(config["num_hidden_layers"])]


def _softmax_first(normalised: bool, config: Mapping[str, Any]) -> bool:
    if normalised and config.get("num_experts_per_tok") == 1:
        raise ValueError("is true with one expert a token, so that its weight is always 1 and the router learns nothing")
    return not normalised  # softmax over the chosen experts is the same as over all and then divided by their sum


_SIZES = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size",),
    "head": ("head_dim",),
    "q": ("num_attention_heads", "head_dim"),
    "kv": ("num_key_value_heads", "head_dim"),
    "ffn": ("intermediate_size",),
}
_FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_sequence_length"),
    Field("tie_word_embeddings", "share_embeddings_and_output_weights"),
    Field("rope_parameters", "rotary_base", _rope_base),
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_key_value_heads", "num_query_groups"),
    Field("head_dim", "kv_channels"),
    Field("rms_norm_eps", "layernorm_epsilon"),
    Field("hidden_act", None, only("silu")),
    Field("attention_bias", None, only(False), default=False),
    Field("attention_dropout", None, only(0, 0.0), default=0.0),
    Field("use_sliding_window", None, only(False), default=False),
    Field("layer_types", None, _all_full, default=None),
)
_IGNORED = frozenset(
    {
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_window_layers",
        "sliding_window",
        "router_aux_loss_coef",
        "output_router_logits",
        "mlp_only_layers",
    }
)
_CONSTANTS = {
    "normalization": "RMSNorm",
    "qk_layernorm": True,
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
}
_EMBEDDING = Weight("embedding.word_embeddings.weight", "vocab", {"model.embed_tokens.weight": ("vocab", "hidden")})
_LAST = (
    Weight("decoder.final_layernorm.weight", "replicated", {"model.norm.weight": ("hidden",)}),
    Weight("output_layer.weight", "vocab", {"lm_head.weight": ("vocab", "hidden")}, tied_to="model.embed_tokens.weight"),
)
_OURS, _THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION = (
    Weight(_OURS + "input_layernorm.weight", "replicated", {_THEIRS + "input_layernorm.weight": ("hidden",)}),
    Weight(
        _OURS + "self_attention.linear_qkv.weight",
        "fused_qkv",
        {
            _THEIRS + "self_attn.q_proj.weight": ("q", "hidden"),
            _THEIRS + "self_attn.k_proj.weight": ("kv", "hidden"),
            _THEIRS + "self_attn.v_proj.weight": ("kv", "hidden"),
        },
    ),
    Weight(_OURS + "self_attention.q_layernorm.weight", "replicated", {_THEIRS + "self_attn.q_norm.weight": ("head",)}),
    Weight(_OURS + "self_attention.k_layernorm.weight", "replicated", {_THEIRS + "self_attn.k_norm.weight": ("head",)}),
    Weight(_OURS + "self_attention.linear_proj.weight", "row", {_THEIRS + "self_attn.o_proj.weight": ("hidden", "q")}),
    Weight(_OURS + "pre_mlp_layernorm.weight", "replicated", {_THEIRS + "post_attention_layernorm.weight": ("hidden",)}),
)


def _mlp(ours: str, theirs: str, ffn: str, layers: Literal["dense", "moe"]) -> tuple[Weight, ...]:
    gate_up = {f"{theirs}.gate_proj.weight": (ffn, "hidden"), f"{theirs}.up_proj.weight": (ffn, "hidden")}
    return (
        Weight(f"{ours}.linear_fc1.weight", "gate_up", gate_up, layers),
        Weight(f"{ours}.linear_fc2.weight", "row", {f"{theirs}.down_proj.weight": ("hidden", ffn)}, layers),
    )


_DENSE = _mlp(_OURS + "mlp", _THEIRS + "mlp", "ffn", "dense")

QWEN3 = ModelSpec(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    fields=_FIELDS,
    ignored=_IGNORED,
    constants=_CONSTANTS,
    sizes=_SIZES,
    weights=(_EMBEDDING, *_ATTENTION, *_DENSE, *_LAST),
)

QWEN3_MOE = ModelSpec(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    fields=(
        *_FIELDS,
        Field("num_experts", "num_moe_experts"),
        Field("num_experts_per_tok", "moe_router_topk"),
        Field("moe_intermediate_size", "moe_ffn_hidden_size"),
        Field("norm_topk_prob", "moe_router_pre_softmax", _softmax_first),
        Field("decoder_sparse_step", "moe_layer_freq", _moe_layers, default=1),
    ),
    ignored=_IGNORED,
    constants=_CONSTANTS | {"moe_router_score_function": "softmax"},
    sizes=_SIZES | {"experts": ("num_experts",), "expert_ffn": ("moe_intermediate_size",)},
    weights=(
        _EMBEDDING,
        *_ATTENTION,
        *_DENSE,
        Weight(_OURS + "mlp.router.weight", "replicated", {_THEIRS + "mlp.gate.weight": ("experts", "hidden")}, "moe"),
        *_mlp(_OURS + "mlp.experts.local_experts.{expert}", _THEIRS + "mlp.experts.{expert}", "expert_ffn", "moe"),
        *_LAST,
    ),
)
