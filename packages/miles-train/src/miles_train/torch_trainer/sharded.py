"""A PackedModel whose weights are cut among ranks, each of which passes samples of its own (torch's FSDP2, ``fully_shard``).

Gradients are sums over ranks, as they are over micro-batches, in float32. On a GPU a layer's weights are gathered for its forward and its
backward pass and given back between, so that a rank never holds more than a layer of others' weights; on a CPU, where ranks share one
memory and a message costs more than it, they are gathered once and the gradient is added up once, whatever the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from .model import PackedModel
from .parts import whole


class Sharded:
    """What ``fully_shard`` is told, and when.

    Attributes:
        model: It takes part from here on in every pass of ``model.outputs``.
        dtype: Of the forward pass; the ranks hold float32.
        gathers_once: Whether weights are gathered once for all passes of a call.
    """

    def __init__(self, model: PackedModel, dtype: torch.dtype, device: torch.device, gathers_once: bool) -> None:
        """Collective. ``model``: in float32 and on the CPU, the same on every rank."""
        self.model, self.dtype, self.gathers_once = model, dtype, gathers_once
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        wide = torch.promote_types(dtype, torch.float32)
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
        layers = [module for module in model.hf.modules() if isinstance(module, GradientCheckpointingLayer)]
        for module in (*layers, model.hf):
            fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=not gathers_once)
        for module in self._parts():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        root: FSDPModule = model.hf  # ty: ignore[invalid-assignment]
        self._root = root
        model.device = device
        if model.replay is not None:
            model.replay.move_to(device)
        object.__setattr__(model.hf, "miles_outputs", model.outputs)
        register_fsdp_forward_method(model.hf, "miles_outputs")
        model.outputs = model.hf.miles_outputs  # ty: ignore[invalid-assignment]

    def most(self, number: int) -> int:
        """See ``Together``."""
        largest = torch.tensor(number, device=self.model.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def before_pass(self, *, last: bool) -> None:
        """See ``Together``."""
        if self.gathers_once:
            self._root.set_requires_gradient_sync(last)
            self._root.set_reshard_after_backward(last)

    def after_passes(self) -> None:
        """See ``Together``. What was gathered is given back: the optimizer changes only what each rank holds."""
        for module in self._parts():
            module.reshard()

    def _parts(self) -> Iterator[FSDPModule]:
        return (module for module in self.model.hf.modules() if isinstance(module, FSDPModule))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """On rank 0 what ``PackedModel.named_weights`` gives, on the CPU; nothing elsewhere. Collective."""
        held = self.whole_weights()
        if self.model.adapter is not None:
            yield from self.model.adapter.in_file(held).items()
        elif held:
            yield from revert_weight_conversion(self.model.hf, held).items()

    @torch.no_grad()
    def whole_weights(self) -> dict[str, Tensor]:
        """On rank 0 what is published, under the modules' name, in the forward pass's dtype, on the CPU, tied ones once: an adapter's
        weights, or all of the model; elsewhere none. Collective."""
        seen: set[int] = set()
        held: dict[str, Tensor] = {}
        adapter = self.model.adapter
        for name, weight in self.model.hf.state_dict(keep_vars=True).items():
            if id(weight) in seen or (adapter is not None and name not in adapter.parameters):
                continue
            seen.add(id(weight))
            tensor = whole(weight.detach().to(self.dtype) if isinstance(weight, DTensor) else weight.detach())
            if dist.get_rank() == 0:
                held[name] = tensor.cpu()
        return held
