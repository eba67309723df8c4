"""Where a transformers model routes: its routers, how many experts there are, and which ones a router chose. No torch here.

Engines record what routers choose and trainers replay it; both find the routers in this one way, so that layer l of the routing
column is the same layer to both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names under which configurations give the number of experts a layer."""


def find_routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router modules in model order; empty for dense models.

    A model declares in ``_can_record_outputs`` which modules give ``router_logits``; these are its routers. They return the
    logits, the weights and the chosen experts, the latter as integers [tokens, top_k].

    Raises:
        ConfigError: It has experts but declares no routers.
    """
    declared = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits", [])
    recorders = declared if isinstance(declared, list) else [declared]
    classes = tuple(c for r in recorders if isinstance(c := getattr(r, "target_class", r), type))
    routers = [module for module in model.modules() if isinstance(module, classes)]
    if not routers and experts(model) > 1:
        raise ConfigError(
            f"{type(model).__name__} has experts, but does not say which modules route (transformers' _can_record_outputs): its routing "
            "can neither be recorded nor replayed"
        )
    return routers


def experts(model: PreTrainedModel) -> int:
    """Number of experts a layer; 0 for dense models."""
    config = model.config.get_text_config()
    return max(getattr(config, name, None) or 0 for name in EXPERT_COUNTS)


def chosen_experts(router: nn.Module, output: object) -> Tensor:
    """The experts that a router chose, integers [tokens, top_k], out of what its forward pass returned.

    Raises:
        ConfigError: It does not return them.
    """
    parts = output if isinstance(output, tuple) else ()
    chosen = [part for part in parts if getattr(part, "ndim", 0) == 2 and not part.is_floating_point()]
    if len(chosen) != 1:
        raise ConfigError(
            f"{type(router).__name__} does not return the experts it chose (one tensor of integers, [tokens, top_k]): its routing can "
            "neither be recorded nor replayed"
        )
    return chosen[0]
