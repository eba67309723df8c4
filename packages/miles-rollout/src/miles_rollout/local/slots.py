"""What the engine knows of the sequences it holds: arrays in slot order, in step with the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .cache import SlotCache

ROW = np.dtype(
    [
        ("running", np.bool_),
        ("cached", np.int64),  # tokens whose keys and values are in the cache
        ("recorded", np.int64),  # tokens whose routing is recorded; what is recorded stays as it is
        ("context", np.int64),  # length of the request's context
        ("length", np.int64),  # tokens known: the context and what was sampled
        ("end", np.int64),  # length at which generation ends
        ("key", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("top_k", np.int64),
        ("min_p", np.float64),
        ("used", np.int64),  # when the slot was last used, in the scheduler's steps
    ]
)
"""A slot's numbers. At most ``length − 1`` tokens are cached: running the last one gives the next token's distribution."""

BLOCK = 64
"""Positions and slots are allocated in multiples of this (slots at most as many as there may be)."""


class Slots:
    """Sequences by slot. Running ones are moved to the first slots, so that a decoding step reads views, not copies.

    Attributes:
        rows: [slots] of ``ROW``.
        tokens: int32 [slots, length].
        logprobs: float32 [slots, length], of sampled tokens.
        versions: int32 [slots, length], of sampled tokens.
        routing: [slots, length, L, K], or None while nothing was recorded (dense models).
        sessions: Name of each slot's session, None where the slot is free.
        calls: What each slot runs for; None where it is idle.
    """

    def __init__(self, cache: SlotCache, max_slots: int, max_length: int) -> None:
        self._cache = cache
        self._max_slots, self._max_length = max_slots, max_length
        self.rows: np.ndarray = np.zeros(0, ROW)
        self.tokens = np.zeros((0, 0), np.int32)
        self.logprobs = np.zeros((0, 0), np.float32)
        self.versions = np.zeros((0, 0), np.int32)
        self.routing: np.ndarray | None = None
        self.sessions: list[str | None] = []
        self.calls: list[Any] = []
        self._slot_of: dict[str, int] = {}

    def find(self, session: str) -> int | None:
        """The session's slot, if it holds one."""
        return self._slot_of.get(session)

    def claim(self, session: str) -> int | None:
        """A slot for a new session: a free one, else that of the session that has been idle for longest; None if all are running."""
        if None not in self.sessions and len(self.rows) < self._max_slots:
            self._grow(min(self._max_slots, max(BLOCK, 2 * len(self.rows))), self.tokens.shape[1])
        if None in self.sessions:
            slot = self.sessions.index(None)
        else:
            used = np.where(self.rows["running"], np.iinfo(np.int64).max, self.rows["used"])
            slot = int(used.argmin())
            if self.rows["running"][slot]:
                return None
            self.release(slot)
        self.sessions[slot] = session
        self._slot_of[session] = slot
        return slot

    def release(self, slot: int) -> None:
        """Forget a slot's sequence."""
        session = self.sessions[slot]
        if session is not None:
            del self._slot_of[session]
        self.sessions[slot] = self.calls[slot] = None
        self.rows[slot] = np.zeros((), ROW)

    def drop_caches(self) -> None:
        """Forget all keys and values, and with them the idle sessions; running sequences are prefilled again."""
        for slot in np.flatnonzero(~self.rows["running"]).tolist():
            self.release(slot)
        self.rows["cached"] = 0

    def reserve(self, length: int) -> None:
        """Make room for sequences of ``length`` tokens."""
        if length > self.tokens.shape[1]:
            doubled = max(length, 2 * self.tokens.shape[1])
            self._grow(len(self.rows), min(self._max_length, -(-doubled // BLOCK) * BLOCK))

    def _grow(self, n_slots: int, length: int) -> None:
        self.rows = _enlarged(self.rows, (n_slots,))
        for name in ("tokens", "logprobs", "versions"):
            setattr(self, name, _enlarged(getattr(self, name), (n_slots, length)))
        if self.routing is not None:
            self.routing = _enlarged(self.routing, (n_slots, length, *self.routing.shape[2:]))
        self.sessions += [None] * (n_slots - len(self.sessions))
        self.calls += [None] * (n_slots - len(self.calls))
        self._cache.grow(n_slots, length)

    def gather_running(self) -> int:
        """Move the running sequences to the first slots and return how many there are."""
        running = self.rows["running"]
        n = int(running.sum())
        holes, movers = np.flatnonzero(~running[:n]), n + np.flatnonzero(running[n:])
        if len(holes):
            self._swap(holes, movers)
        return n

    def _swap(self, a: np.ndarray, b: np.ndarray) -> None:
        here, there = np.concatenate([a, b]), np.concatenate([b, a])
        length = int(self.rows["length"][here].max())
        self.rows[here] = self.rows[there]
        for held in (self.tokens, self.logprobs, self.versions, self.routing):
            if held is not None:
                held[here, :length] = held[there, :length]
        self._cache.swap(self._tensor(a), self._tensor(b), int(self.rows["cached"][here].max()))
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            for names in (self.sessions, self.calls):
                names[i], names[j] = names[j], names[i]
        self._slot_of |= {session: slot for slot in here.tolist() if (session := self.sessions[slot]) is not None}

    def share(self, source: int, targets: list[int], length: int) -> None:
        """Copy what running the first ``length`` tokens gave from one slot to others that hold the same tokens."""
        target = np.array(targets)
        self._cache.copy(self._tensor(np.full(len(targets), source)), self._tensor(target), length)
        self.rows["cached"][target] = length
        if self.routing is not None:
            first = int(self.rows["recorded"][targets[0]])  # the same for all
            self.routing[target, first:length] = self.routing[source, first:length]
            self.rows["recorded"][target] = np.maximum(first, length)

    def record(self, slots: np.ndarray, positions: np.ndarray, counts: np.ndarray, routing: np.ndarray) -> None:
        """Keep the routing of tokens just run, where none is recorded yet.

        Args:
            slots: int64 [n].
            positions: int64 [n, S], rising by one.
            counts: int64 [n]; the first so many columns of a row are tokens of the sequence.
            routing: [n, S, L, K].
        """
        if self.routing is None:
            self.routing = np.zeros((*self.tokens.shape, *routing.shape[2:]), routing.dtype)
        new = (np.arange(positions.shape[1]) < counts[:, None]) & (positions >= self.rows["recorded"][slots][:, None])
        row, column = np.nonzero(new)
        self.routing[slots[row], positions[row, column]] = routing[row, column]
        self.rows["recorded"][slots] = np.maximum(self.rows["recorded"][slots], positions[:, 0] + counts)

    def _tensor(self, slots: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(slots).to(self._cache.device)


def _enlarged(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    new = np.zeros(shape, array.dtype)
    new[tuple(slice(0, size) for size in array.shape)] = array
    return new
