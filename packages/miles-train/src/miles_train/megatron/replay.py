"""Routing replay in megatron-core: its own RouterReplay, taught that some rows have no record and that ranks hold parts of the rows.

megatron's hook sits where a router takes its top-k: it may hand back given experts and their scores, and gradients go on as if the
router had chosen them. What it is given is one index set for all rows of a rank, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from miles_core.batch import Batch
from miles_core.errors import ConfigError, RunError

from ..routing import MoeShape, experts_to_replay
from . import bridge

bridge.install()

from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction  # noqa: E402

FORWARD, BACKWARD = RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD


class MegatronReplay:
    """Puts recorded experts into the routers of a model, or of the pipeline stage that is here.

    For each micro-batch, in the order in which the schedule runs them forward: ``with replay.micro_batch(...)`` around the forward pass.
    Several may be in flight before the first goes backward. A router that runs outside is computed again for the backward pass, and
    gets the experts of the micro-batches in that same order. ``finish`` after the last backward pass.

    Attributes:
        shape: What the whole model's routing looks like; its ``layers`` are those of all stages.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ConfigError if the model's config has its routers choose in a way that megatron's hook does not see.

        Args:
            model: A GPTModel, or a DistributedDataParallel around one; dense ones have nothing to replay.
        """
        config: Any = model.config
        _check_config(config)
        layers = moe_layers(config)
        self.shape = MoeShape(len(layers), config.moe_router_topk, config.num_moe_experts or 0)
        self._layers: list[LayerReplay] = []
        self._cut = (0, 1)
        for router in (m for m in model.modules() if isinstance(m, TopKRouter)):
            assert isinstance(router.layer_number, int), "a router that stands in no layer"
            layer = LayerReplay(layers.index(router.layer_number - 1))
            _replace(router, layer)
            self._layers.append(layer)
            if config.sequence_parallel:
                self._cut = (router.tp_group.rank(), router.tp_group.size())
        self._open = self._replayed = self._seen = 0

    @contextmanager
    def micro_batch(self, batch: Batch | None, n_rows: int) -> Generator[None]:
        """Around the forward pass of one micro-batch.

        Args:
            batch: The real rows of this context-parallel rank, with the column ``routing`` (``load_routing`` has checked it). None: all
                routers choose for themselves and nothing is counted (dummies, a forward pass to compare with).
            n_rows: R, the rows of this rank with padding, which comes last. Sequence-parallel ranks say the same, and each takes its part.

        Raises:
            RunError: After the pass, if a router ran more or less than once; in it, if a router sees another number of rows.
        """
        keep = torch.is_grad_enabled()
        given = None if batch is None else self._mine(experts_to_replay(batch), n_rows)
        for layer in self._layers:
            layer.begin(None if given is None else given[:, layer.index], keep=keep)
        yield
        for layer in self._layers:
            layer.end()
        self._open += keep
        if batch is not None:
            self._count(given, batch.n_rows, n_rows)

    def finish(self) -> dict[str, float]:
        """What was counted since the last call, to be added up over all ranks: ``differs``, ``replayed`` and ``rows`` as
        ``routing_metrics`` takes them.

        Raises:
            RunError: Routers were computed again for some of the micro-batches and not for others, so that those got each other's experts.
        """
        counts = {"differs": float(sum(layer.take_differs() for layer in self._layers))}
        counts |= {"replayed": float(self._replayed), "rows": float(self._seen)}
        left, expected = [layer.clear() for layer in self._layers], self._open
        self._open = self._replayed = self._seen = 0
        if wrong := [n for n in left if n not in (0, expected)]:
            raise RunError(
                f"a router was computed again for {expected - wrong[0]} of {expected} micro-batches, expected all or none: their recorded "
                "experts went to other micro-batches. Set routing_replay: false, and report this layout"
            )
        return counts

    def _mine(self, given: np.ndarray | None, n_rows: int) -> Tensor | None:
        """int64 [rows of this rank, L, K], −1 in padding."""
        if given is None:
            return None
        padded = np.full((n_rows, *given.shape[1:]), -1)
        padded[: len(given)] = given
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        return torch.from_numpy(padded[self._part(n_rows)]).to(device)

    def _part(self, n_rows: int) -> slice:
        """The rows that routers see here."""
        rank, size = self._cut
        return slice(rank * n_rows // size, (rank + 1) * n_rows // size)

    def _count(self, given: Tensor | None, real: int, n_rows: int) -> None:
        part = self._part(n_rows)
        self._seen += len(self._layers) * len(range(n_rows)[part][: max(0, real - part.start)])
        if given is not None:
            self._replayed += len(self._layers) * int((given[:, 0, 0] >= 0).sum())


class LayerReplay(RouterReplay):
    """The hook of one router.

    Attributes:
        index: Which MoE layer of the whole model this is.
    """

    def __init__(self, index: int) -> None:
        super().__init__()  # joins megatron's list of all hooks
        self.index = index
        self._calls = 0
        self._differs: Tensor | None = None

    def begin(self, given: Tensor | None, *, keep: bool) -> None:
        """A forward pass begins; ``given`` int64 [rows, K], −1 where the router chooses, or None: everywhere. ``keep`` it for recompute."""
        self.target_topk_idx = given
        if keep:
            self.replay_backward_list.append(given)  # ty: ignore[invalid-argument-type], megatron's list has no None
        self.set_router_replay_action(FORWARD)
        self._calls = 0

    def end(self) -> None:
        """It is over; what comes now is recomputation."""
        self.target_topk_idx = None
        self.set_router_replay_action(BACKWARD)
        if self._calls != 1:
            raise RunError(
                f"the router of MoE layer {self.index} chose {self._calls} times in one forward pass, expected once: the recorded routing "
                "was not replayed. Set routing_replay: false for this model"
            )

    def take_differs(self) -> int:
        """How many replayed rows the router would have sent elsewhere, since the last call."""
        count = 0 if self._differs is None else int(self._differs)
        self._differs = None
        return count

    def clear(self) -> int:
        """Forget what is kept for recomputation; how many micro-batches that was. The router chooses for itself from now on."""
        left = len(self.replay_backward_list)
        self.clear_indices()
        self.clear_router_replay_action()
        return left

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores [rows, K] and indices of the given experts, and of the router's own where none are given."""
        assert default_compute_topk is not None
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.router_replay_action is FORWARD:
            given = self.target_topk_idx
            self._calls += 1
        elif self.router_replay_action is BACKWARD:
            if not self.replay_backward_list:
                raise RunError(f"the router of MoE layer {self.index} ran outside of a micro-batch's forward pass and its recomputation")
            given = self.replay_backward_list.pop(0)
        else:
            return values, own
        if given is None:
            return values, own
        if given.shape != own.shape:
            raise RunError(
                f"the router of MoE layer {self.index} makes choices of shape {list(own.shape)}, but was given {list(given.shape)}: the "
                "rows of a micro-batch and of its routing are cut differently"
            )
        known = given >= 0
        chosen = torch.where(known, given, own)
        if self.router_replay_action is FORWARD:
            differs = ((own.sort(-1).values != given.sort(-1).values).any(-1) & known[:, 0]).sum()
            self._differs = differs if self._differs is None else self._differs + differs
        return scores.gather(1, chosen), chosen


def moe_layers(config: TransformerConfig) -> list[int]:
    """Indices of the MoE layers of the whole model."""
    if not config.num_moe_experts:
        return []
    every = config.moe_layer_freq
    pattern = every if isinstance(every, list) else [int(layer % every == 0) for layer in range(config.num_layers)]
    return [layer for layer, moe in enumerate(pattern) if moe]


def _check_config(config: TransformerConfig) -> None:
    """Raise a ConfigError for options under which routers do not ask the hook, or change what it says."""
    bad = {
        "moe_router_fusion": config.moe_router_fusion,
        "moe_router_load_balancing_type: sinkhorn": "sinkhorn" in np.atleast_1d(config.moe_router_load_balancing_type),
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
    }
    if config.num_moe_experts and any(bad.values()):
        name = next(name for name, is_set in bad.items() if is_set)
        raise ConfigError(f"megatron's {name} does not go with routing replay: recorded experts would not be taken. Switch one of them off")


def _replace(router: TopKRouter, layer: LayerReplay) -> None:
    """Let ``layer`` be the router's hook, and the one in megatron's list."""
    others = RouterReplay.global_router_replay_instances
    others[:] = [other for other in others if other is not router.router_replay]
    router.router_replay = layer
