"""AdamW over float32 master weights; the forward pass uses them rounded to the compute dtype."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..plugins import AdamWTrainerConfig
from .parts import part_of, whole


class MasterAdamW:
    """Master weights, their gradients and moments (all float32), and how they reach the weights of the forward pass.

    AdamW as in Loshchilov and Hutter 2019 (arXiv:1711.05101). Without masters of its own a bfloat16 weight of size 1 would
    not move by less than 2⁻⁸: at RL's learning rates, never.

    Attributes:
        masters: By parameter name; other parameters are frozen. In float32 training they are the model's own parameters.
    """

    def __init__(self, model: nn.Module, masters: Mapping[str, nn.Parameter], config: AdamWTrainerConfig) -> None:
        self.masters = dict(masters)
        self._compute = {name: weight for name, weight in model.named_parameters() if name in self.masters}
        groups = [
            {"params": [p for p in self.masters.values() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.masters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
        for name, weight in self._compute.items():
            if weight is not self.masters[name]:
                weight.register_post_accumulate_grad_hook(partial(_accumulate, self.masters[name]))

    def gradient_norm(self) -> Tensor:
        """L2 norm of the accumulated gradient, over all ranks that hold a part of it; a scalar."""
        return whole(torch.nn.utils.get_total_norm([p.grad for p in self.masters.values() if p.grad is not None]))

    def step(self, lr: float, norm: Tensor, max_norm: float) -> None:
        """One AdamW step with the gradient, whose norm is ``norm``, clipped to ``max_norm``."""
        torch.nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.publish()

    def zero_grad(self) -> None:
        """Forget the accumulated gradient and give its memory back."""
        self._adamw.zero_grad(set_to_none=True)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights of the forward pass."""
        for name, weight in self._compute.items():
            if weight is not self.masters[name]:
                weight.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts as ``<kind>.<parameter>``; parameters that never had a gradient have none."""
        return {f"{kind}.{name}": x for name, p in self.masters.items() for kind, x in self._adamw.state.get(p, {}).items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what ``state`` gave."""
        self._adamw.state.clear()
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            master = self.masters[name]
            self._adamw.state[master][kind] = tensor.to(master.device) if kind == "step" else part_of(tensor, master)


def _accumulate(master: nn.Parameter, weight: Tensor) -> None:
    """Add a micro-batch's gradient to the master's, in float32."""
    assert weight.grad is not None
    gradient = weight.grad.to(master.dtype)
    weight.grad = None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
