"""Whether a model can be spread over a layout. No torch here: `miles check` reads this module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ranks.layout import Layout
from .specs import check_model_type, model_spec


def problems(layout: Layout, hf_config: Mapping[str, Any]) -> list[str]:
    """What in these sizes, or in a model (its config.json) under them, does not fit, a sentence each; empty if all is well.

    Raises:
        ConfigError: The model's architecture or a field of its config is not supported (``specs.model_spec``).
    """
    if small := [name for name, size in vars(layout).items() if size < 1]:
        return [f"the {name}-parallel size is {getattr(layout, name)}; the least is 1, which does not cut" for name in small]
    spec = model_spec(hf_config)
    model = spec.transformer(hf_config) | spec.model(hf_config)
    divided = [
        ("tensor", "attention heads", model["num_attention_heads"]),
        ("tensor", "key/value heads", model["num_query_groups"]),
        ("tensor", "columns in an MLP", model["ffn_hidden_size"]),
        ("pipeline", "layers", model["num_layers"]),
    ]
    experts = model.get("num_moe_experts")
    if experts:
        divided.append(("expert", "experts", experts))
    found = _uneven(layout, divided)
    if layout.expert > 1 and not experts:
        found.append(f"{layout.expert} expert-parallel ranks, but {spec.architecture} has no experts; leave expert at 1")
    else:
        found += _experts_nowhere(layout)
    vocab = model["vocab_size"]
    if -(-vocab // layout.tensor) * (layout.tensor - 1) >= vocab:
        found.append(f"a vocabulary of {vocab} leaves some of {layout.tensor} tensor-parallel ranks without a token; choose fewer")
    return found


def early_problems(layout: Layout, fields: Mapping[str, Any]) -> list[str]:
    """What the fields that a recipe gives of a new model's config say already; what they leave out is looked at when it is built.

    Raises:
        ConfigError: No table is for its ``model_type``.
    """
    if "model_type" in fields:
        check_model_type(fields["model_type"])
    shared = [
        ("tensor", "attention heads", "num_attention_heads"),
        ("tensor", "key/value heads", "num_key_value_heads"),
        ("tensor", "columns in an MLP", "intermediate_size"),
        ("pipeline", "layers", "num_hidden_layers"),
        ("expert", "experts", "num_experts"),
    ]
    return _uneven(layout, [(axis, what, fields[name]) for axis, what, name in shared if name in fields]) + _experts_nowhere(layout)


def _uneven(layout: Layout, divided: list[tuple[str, str, int]]) -> list[str]:
    """A sentence for each (axis, what its ranks share, how many of it) that does not divide."""
    return [
        f"{size} {axis}-parallel ranks cannot share {count} {what} evenly; choose a number of {axis}-parallel ranks that divides {count}"
        for axis, what, count in divided
        if count % (size := getattr(layout, axis))
    ]


def _experts_nowhere(layout: Layout) -> list[str]:
    if layout.stage_size % layout.expert == 0:
        return []
    return [
        f"{layout.expert} expert-parallel ranks do not divide the tensor × context × data = {layout.stage_size} ranks of a pipeline "
        "stage, over which experts are spread; choose an expert-parallel size that does"
    ]
