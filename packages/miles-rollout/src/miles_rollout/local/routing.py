"""Which experts a mixture-of-experts model chose, recorded while it runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from miles_core.errors import ConfigError
from miles_core.moe import chosen_experts, experts, find_routers


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
        self._chosen.append(chosen_experts(router, output))

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
