"""Keys and values of many sequences, one slot each, behind the Cache interface of transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Aim:
    """Where one forward pass of n rows and S columns reads and writes.

    Attributes:
        slots: int64 [n]; row i is the sequence in slot ``slots[i]``.
        positions: int64 [n, S]: where the keys and values of each input go in their sequence.
        length: Positions that attention sees, from 0 on: L.
        leading: Whether ``slots`` is 0 … n − 1, so that a view does instead of a copy.
    """

    slots: Tensor
    positions: Tensor
    length: int
    leading: bool


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each [slots, heads_kv, positions, head_dim]; allocated when their shape is first seen."""

    keys: Tensor  # ty: ignore[incompatible-mutable-override]
    values: Tensor  # ty: ignore[incompatible-mutable-override]

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros: a stale NaN would get through attention's zero weights."""
        n_slots, length = self._cache.n_slots, self._cache.length
        self.keys, self.values = (
            torch.zeros(n_slots, states.shape[1], length, states.shape[3], dtype=states.dtype, device=states.device)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write [n, heads_kv, S, head_dim] where the cache is aimed; read all that attention sees, [n, heads_kv, L, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        aim = self._cache.aim
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            held[aim.slots[:, None], :, aim.positions] = states.transpose(1, 2)
        return self._read(self.keys, aim), self._read(self.values, aim)

    @staticmethod
    def _read(held: Tensor, aim: Aim) -> Tensor:
        seen = held[:, :, : aim.length]
        return seen[: len(aim.slots)] if aim.leading else seen[aim.slots]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset. Masks are made outside; nothing asks."""
        return self._cache.aim.length, 0

    def get_seq_length(self) -> int:
        """Rows differ in length: positions are always given from outside."""
        return 0

    def get_max_length(self) -> int:
        """−1: it grows."""
        return -1


class SlotCache(Cache):
    """A cache whose rows are at different positions; set ``aim`` before each forward pass."""

    def __init__(self, n_layers: int, device: torch.device) -> None:
        self._slot_layers = [SlotLayer(self) for _ in range(n_layers)]
        super().__init__(layers=[*self._slot_layers])
        self.device = device
        self.n_slots = 0
        self.length = 0
        self.aim: Aim
        self._held: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        """Give the memory back: no slots, no positions."""
        self._resize(0, 0)

    def grow(self, n_slots: int, length: int) -> None:
        """Make room for more slots and positions."""
        self._resize(n_slots, length)

    def _resize(self, n_slots: int, length: int) -> None:
        self.n_slots, self.length = n_slots, length
        self._held = []
        for layer in self._slot_layers:
            if layer.is_initialized:
                layer.keys, layer.values = (_resized(held, n_slots, length) for held in (layer.keys, layer.values))

    def held(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [slots · heads_kv, positions, head_dim]; once something was run."""
        if not self._held:
            self._held = [(layer.keys.flatten(0, 1), layer.values.flatten(0, 1)) for layer in self._slot_layers]
        return self._held

    def copy(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first ``length`` positions of slots ``source[i]`` to slots ``target[i]``, all at once: slots may be exchanged."""
        for held in self._tensors():
            seen = held[:, :, :length]
            seen.index_copy_(0, target, seen.index_select(0, source))

    def _tensors(self) -> list[Tensor]:
        return [held for layer in self._slot_layers if layer.is_initialized for held in (layer.keys, layer.values)]


def _resized(held: Tensor, n_slots: int, length: int) -> Tensor:
    new = held.new_zeros(n_slots, held.shape[1], length, held.shape[3])
    n_slots, length = min(n_slots, held.shape[0]), min(length, held.shape[2])
    new[:n_slots, :, :length] = held[:n_slots, :, :length]
    return new
