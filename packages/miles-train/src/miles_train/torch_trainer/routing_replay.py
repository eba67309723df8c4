"""Routing replay in a Hugging Face model: its routers take the experts that were recorded, with gradients as if they had chosen them.

A router computes scores [rows, E], takes ``torch.topk`` of them, and makes weights of the scores it got. While a router runs,
its ``topk`` answers with the recorded experts and their scores; everything else stays the router's own code, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from miles_core.batch import Batch
from miles_core.errors import ConfigError, RunError
from miles_core.moe import chosen_experts, experts, find_routers

from ..routing import MoeShape, experts_to_replay


class RoutingReplay:
    """Puts recorded experts into a model's routers.

    Attributes:
        shape: What the model's routing looks like.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ConfigError if the model's routers are of a kind that cannot be made to take given experts; the sentence says why."""
        self._routers = find_routers(model)
        self._model = type(model).__name__
        self._device = model.device
        self._rows: Tensor | None  # [rows of the layout, L, K] of the latest forward pass, kept for its recomputation
        self._calls = np.zeros(len(self._routers), np.int64)
        self._counting = self._off = False
        self.reset()
        calls = _router_calls(model, self._routers)
        ks = [_check_router(router, *calls[i], experts(model)) for i, router in enumerate(self._routers)]
        self.shape = MoeShape(len(self._routers), max(ks, default=0), experts(model))
        for layer, router in enumerate(self._routers):
            router.forward = self._wrapped(layer, router.forward)

    def move_to(self, device: torch.device) -> None:
        """The model goes to another device; what was counted is forgotten."""
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Start counting anew; routers choose for themselves outside of ``forward``."""
        self._rows = None
        self._replayed = self._seen = 0
        self._differs = torch.zeros((), dtype=torch.int64, device=self._device)
        self._wrong = torch.zeros((), dtype=torch.int64, device=self._device)

    def finish(self) -> dict[str, float]:
        """What was counted since ``reset``, which is done again: ``differs``, ``replayed``, ``rows`` as ``routing_metrics`` takes them."""
        counts = {"differs": float(self._differs), "replayed": float(self._replayed), "rows": float(self._seen)}
        self.reset()
        return counts

    @contextmanager
    def forward(self, batch: Batch, where: np.ndarray, n_rows: int) -> Generator[None]:
        """Around one forward pass over a micro-batch. Recomputation in its backward pass takes the same experts, so the backward must come
        before the next forward.

        Args:
            batch: With the column ``routing``, checked (``load_routing``).
            where: int64 [N], index of each packed row among the rows that the routers see; rows that share one have the same experts.
            n_rows: How many those are, padding included.

        Raises:
            RunError: After the pass, if a router did not take what was recorded, or ran more or less than once.
        """
        given = None if self._off else experts_to_replay(batch)
        self._rows = None
        if given is not None:
            spread = np.full((n_rows, *given.shape[1:]), -1)
            spread[where] = given
            self._rows = torch.from_numpy(spread).to(self._device)
        self._calls[:] = 0
        self._wrong.zero_()
        self._counting = True
        try:
            yield
        finally:
            self._counting = False
            if not torch.is_grad_enabled():
                self._rows = None
        if not self._off:
            self._seen += len(np.unique(where)) * self.shape.layers
        if given is not None:
            self._check()
            self._replayed += len(np.unique(where[given[:, 0, 0] >= 0])) * self.shape.layers

    @contextmanager
    def off(self) -> Generator[None]:
        """Routers choose for themselves, and nothing is counted."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def _check(self) -> None:
        """Raise a RunError unless each router ran once and returned the experts it was given."""
        if (self._calls != 1).any():
            layer = int((self._calls != 1).argmax())
            raise RunError(
                f"the router of MoE layer {layer} of {self._model} chose {self._calls[layer]} times for the rows of a forward pass, "
                "expected once: the recorded routing was not replayed. Set routing_replay: false for this model"
            )
        if wrong := int(self._wrong):
            raise RunError(
                f"{wrong} rows of {self._model} went to other experts than the recorded ones: its routers change what topk gave them. "
                "Set routing_replay: false for this model"
            )

    def _wrapped(self, layer: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """The forward pass of a router, whose own is ``own``."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._rows is None:
                return own(*args, **kwargs)
            given = self._rows[:, layer]
            filled = args[0].shape[:-1].numel() - len(given)  # rows that others put behind (miles_kernels.invariant)
            given = F.pad(given, (0, 0, 0, filled), value=-1) if filled else given
            with _TopK(given, self.shape.experts) as topk:
                output = own(*args, **kwargs)
            if self._counting:  # not when it is computed again in the backward pass
                known = given[:, 0] >= 0
                self._calls[layer] += topk.calls
                self._differs += (_differ(topk.own, given) & known).sum()
                self._wrong += (_differ(chosen_experts(self._routers[layer], output), given) & known).sum()
            return output

        return forward


@torch.no_grad()
def _router_calls(model: PreTrainedModel, routers: list[nn.Module]) -> list[tuple[tuple, dict[str, Any]]]:
    """What each router is called with in a forward pass over some tokens."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    hooks = [
        router.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True) for router in routers
    ]
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    model.base_model(torch.arange(16, device=model.device)[None] % len(embedding), use_cache=False)
    for hook in hooks:
        hook.remove()
    if len(calls) != len(routers):
        raise ConfigError(
            f"{len(routers)} routers of {type(model).__name__} ran {len(calls)} times in one forward pass: its routing cannot be replayed. "
            "Set routing_replay: false"
        )
    return calls


@torch.no_grad()
def _check_router(router: nn.Module, args: tuple, kwargs: dict[str, Any], n_experts: int) -> int:
    """K, the experts a token takes, once it is known that the router takes what it is given.

    Given its own choice, it must return what it returns by itself; given others, it must return these, with weights that are finite and
    not 0. Scores of 0 or −∞ are those of experts that were ruled out before the choice (groups), and no weights can be made of them.

    Args:
        router: As transformers made it.
        args, kwargs: What it may be called with.
        n_experts: How many it chooses from.
    """
    name, end = type(router).__name__, "its routing cannot be replayed. Set routing_replay: false"
    alone = router(*args, **kwargs)
    chosen = chosen_experts(router, alone)
    with _TopK(chosen, n_experts) as topk:
        same = router(*args, **kwargs)
    if topk.calls != 1:
        raise ConfigError(f"{name} chooses by {topk.calls} calls of torch.topk over all {n_experts} experts, expected one: {end}")
    others = torch.stack([torch.arange(n_experts, device=chosen.device).roll(row)[: chosen.shape[1]] for row in range(len(chosen))])
    with _TopK(others, n_experts):
        output = router(*args, **kwargs)
    if not all(torch.equal(a, b) for a, b in zip(alone, same, strict=True)) or _differ(chosen_experts(router, output), others).any():
        raise ConfigError(f"{name} changes what topk gave it: {end}")
    weights = [part for part in output if part.shape == others.shape and part.is_floating_point()]
    if len(weights) != 1 or not (weights[0].isfinite() & (weights[0] != 0)).all():
        raise ConfigError(f"{name} gives no weight to experts outside the groups that it chose itself: {end}")
    return chosen.shape[1]


class _TopK(TorchFunctionMode):
    """While it is active, ``topk`` over the scores of all experts answers with the given ones.

    Attributes:
        own: int64 [rows, K], what topk would have answered.
        calls: How often it was asked.
    """

    def __init__(self, given: Tensor, n_experts: int) -> None:
        """``given``: int64 [rows, K], rows of −1 keep their own."""
        super().__init__()
        self.own = given
        self.calls = 0
        self._given = given
        self._n_experts = n_experts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return result
        scores = args[0] if args else (kwargs or {})["input"]
        rows, k = self._given.shape
        if scores.shape != (rows, self._n_experts) or result.indices.shape != (rows, k):
            return result  # a choice of groups, or within them
        self.calls += 1
        self.own = result.indices
        chosen = torch.where(self._given >= 0, self._given, self.own)
        return torch.return_types.topk((scores.gather(1, chosen), chosen))


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """bool [rows]: two choices [rows, K] are not the same set."""
    return (a.sort(-1).values != b.sort(-1).values).any(-1)
