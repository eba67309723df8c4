"""megatron-core's data parallelism and optimizer around one pipeline stage: gradients are sums, AdamW over float32 masters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..plugins import AdamWTrainerConfig
from . import weights
from .model import PolicyModel  # installs the bridge before megatron is imported

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


class ShardedAdamW:
    """What trains a PolicyModel.

    Attributes:
        module: The model in megatron's DistributedDataParallel: what the schedule gets.
        masters: float32 master weight of each parameter by name; in float32 training the parameter itself.
    """

    def __init__(self, model: PolicyModel, config: AdamWTrainerConfig, path: Path) -> None:
        """Collective. ``path`` is read again where the masters hold more digits than the model's parameters."""
        mixed = model.config.params_dtype != torch.float32
        digits = _in_float32(model, path) if mixed else {}
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False)
        self.module = DistributedDataParallel(model.config, ddp, model)
        model.config.finalize_model_grads_func = _finalize
        self._optimizer: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.betas[0],
                adam_beta2=config.betas[1],
                adam_eps=config.eps,
                clip_grad=config.max_grad_norm,
                bf16=mixed,
                params_dtype=model.config.params_dtype,
            ),
            [self.module],
            use_gloo_process_groups=False,  # only megatron's own checkpoints need them
        )
        self._weight_decay = config.weight_decay
        self._max_norm = config.max_grad_norm
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.masters: dict[str, Tensor] = {n: cast("Any", p).main_param if mixed else p for n, p in self.parameters.items()}
        for name, whole in digits.items():
            self.masters[name].copy_(whole)

    def gradient_norm(self) -> float:
        """L2 norm of the whole model's gradient. Collective; the same on every rank."""
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    @torch.no_grad()
    def step(self, lr: float, norm: float) -> None:
        """One AdamW step with the gradient, whose norm is ``norm``, clipped to the largest that is allowed."""
        for one in self._inner():
            clip_grad_by_total_norm_fp32(one.get_parameters(), self._max_norm, norm)
            for group in one.optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, self._weight_decay * group["wd_mult"]  # megatron leaves this to its scheduler
        self._optimizer.step_with_ready_grads()

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self._optimizer.zero_grad()
        self.module.zero_grad_buffer()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights of the forward pass."""
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts as ``<kind>.<parameter>``; none before the first step."""
        states = self._states()
        return {f"{kind}.{name}": x for name, master in self.masters.items() for kind, x in states[master].get(master, {}).items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take what ``state`` gave. Every parameter has a step count of its own, as torch's AdamW changes it in place."""
        states = self._states()
        for name, master in self.masters.items():
            states[master].pop(master, None)
            if own := {kind: tensors[f"{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind}.{name}" in tensors}:
                states[master][master] = own

    def _inner(self) -> Iterator[Any]:
        """megatron keeps the optimizers of experts and of all other parameters apart."""
        return (one for one in self._optimizer.chained_optimizers if not one.is_stub_optimizer and one.get_parameters())

    def _states(self) -> dict[Tensor, Any]:
        """Where the state of each master is kept."""
        return {master: one.optimizer.state for one in self._inner() for master in one.get_parameters()}


def _finalize(model: list, num_tokens: Tensor | None, **groups: Any) -> None:
    """Add up the ranks' gradients; not divided by anything: the loss is a sum of shares."""
    finalize_model_grads(model, None, **groups)


@torch.no_grad()
def _in_float32(model: PolicyModel, path: Path) -> dict[str, Tensor]:
    """The checkpoint's parameters of this rank in float32: it may hold more digits than the forward pass uses.

    To be called before DistributedDataParallel hooks into the parameters: changing their dtype makes torch forget hooks.
    """
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    whole = {name: torch.empty_like(data, dtype=torch.float32) for name, data in own.items()}
    for name, parameter in model.named_parameters():
        parameter.data = whole[name]
    try:
        weights.load(model, path)
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]
    return whole
