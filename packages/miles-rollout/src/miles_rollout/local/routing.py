"""Which experts a mixture-of-experts model chose: found, and recorded while it runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from miles_core.errors import ConfigError

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
            f"{type(model).__name__} has experts, but does not say which modules route; the local engine cannot record its routing"
        )
    return routers


def experts(model: PreTrainedModel) -> int:
    """Number of experts a layer; 0 for dense models."""
    config = model.config.get_text_config()
    return max(getattr(config, name, None) or 0 for name in EXPERT_COUNTS)


class RoutingRecorder:
    """Keeps what the routers chose in the latest forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._routers = find_routers(model)
        self._chosen: list[Tensor] = []
        self._n_experts = experts(model)
        for router in self._routers:
            router.register_forward_hook(self._record)

    def start(self) -> None:
        """Before a forward pass."""
        self._chosen.clear()

    def _record(self, router: nn.Module, inputs: object, output: object) -> None:
        chosen = [t for t in output if _is_choice(t)] if isinstance(output, tuple) else []
        if len(chosen) != 1:
            raise ConfigError(
                f"{type(router).__name__} does not return the experts it chose (one tensor of integers, [tokens, top_k]); "
                "the local engine cannot record its routing. Use another engine for this model."
            )
        self._chosen.append(chosen[0])

    def take(self, rows: int, columns: int) -> np.ndarray | None:
        """[rows, columns, L, K] of the forward pass just done, uint8 up to 255 experts, else uint16; None for dense models."""
        if not self._routers:
            return None
        if len(self._chosen) != len(self._routers):
            raise ConfigError(
                f"{len(self._routers)} routers ran {len(self._chosen)} times in one forward pass; this model is not supported"
            )
        stacked = torch.stack(self._chosen, dim=1).reshape(rows, columns, len(self._chosen), -1).cpu().numpy()
        return stacked.astype(np.uint8 if self._n_experts <= 255 else np.uint16)


def _is_choice(output: object) -> bool:
    return isinstance(output, Tensor) and output.dim() == 2 and not output.is_floating_point()
