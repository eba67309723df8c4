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
        ("stale", np.int64),  # of these, tokens whose routing earlier weights chose
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

SHARED = 32
"""Tokens that must be gained for a beginning to be copied from another sequence. Fewer are run again: that costs less than looking."""

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
        """A slot for a new session: a free one, else that of the session that has been idle for longest; None if all are running.

        What the slot still holds of another sequence counts as the new session's own as far as the two begin alike.
        """
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
        if self.rows["stale"][slot]:
            self.rows[slot] = np.zeros((), ROW)
        return slot

    def release(self, slot: int) -> None:
        """Take a slot from its session. Its keys and values stay, for sessions that begin alike."""
        session = self.sessions[slot]
        if session is not None:
            del self._slot_of[session]
        self.sessions[slot] = self.calls[slot] = None
        self.rows["running"][slot] = False

    def drop_caches(self) -> None:
        """Forget all keys and values, and with them the idle sessions; running sequences are prefilled again."""
        for slot in np.flatnonzero(~self.rows["running"]).tolist():
            self.release(slot)
            self.rows[slot] = np.zeros((), ROW)
        self.rows["cached"] = 0
        self.rows["stale"] = self.rows["recorded"]

    def begin(self, slot: int, tokens: np.ndarray) -> None:
        """Put a context (int32 [T]) into a slot; as many of its tokens as possible, at most T − 1, are cached already.

        They are those with which the slot's present tokens begin too, or another slot's, if it holds ``SHARED`` more of them.
        """
        self.reserve(len(tokens) + 1)
        row = self.rows[slot]
        cached = self._common(slot, tokens)
        self.tokens[slot, : len(tokens)] = tokens
        row["cached"], row["length"] = cached, len(tokens)
        row["recorded"] = min(int(row["recorded"]), cached)
        row["stale"] = min(int(row["stale"]), int(row["recorded"]))
        if len(tokens) - 1 - cached >= SHARED:
            self._take_prefix(slot, tokens)

    def _take_prefix(self, slot: int, tokens: np.ndarray) -> None:
        """Copy from the slot that begins like these tokens for longest, if that is at least ``SHARED`` longer than what is cached."""
        rows, least = self.rows, int(self.rows["cached"][slot]) + SHARED
        others = np.flatnonzero((rows["cached"] >= least) & (rows["stale"] <= rows["recorded"][slot]))
        others = others[(self.tokens[others, :least] == tokens[:least]).all(axis=1)]
        if len(others):
            known = np.minimum(rows["cached"][others], len(tokens) - 1)
            differ = self.tokens[others, : known.max()] != tokens[: known.max()]
            common = np.minimum(known, np.where(differ.any(axis=1), differ.argmax(axis=1), known))
            self.share(int(others[common.argmax()]), [slot], int(common.max()))

    def _common(self, slot: int, tokens: np.ndarray) -> int:
        """How many of the tokens, all but the last, a slot has cached."""
        known = min(int(self.rows["cached"][slot]), len(tokens) - 1)
        same = self.tokens[slot, :known] == tokens[:known]
        return known if same.all() else int(same.argmin())

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

    def gather(self, chosen: np.ndarray) -> int:
        """Move the chosen sequences (bool [slots]) to the first slots and return how many there are."""
        n = int(chosen.sum())
        holes, movers = np.flatnonzero(~chosen[:n]), n + np.flatnonzero(chosen[n:])
        if len(holes):
            free = np.array([self.sessions[slot] is None for slot in holes.tolist()])
            self._exchange(holes[free], movers[: free.sum()], swap=False)
            self._exchange(holes[~free], movers[free.sum() :], swap=True)
        return n

    def _exchange(self, a: np.ndarray, b: np.ndarray, *, swap: bool) -> None:
        """What is in slots b[i] goes to slots a[i], and what was there, if it is wanted, to b[i]; no slot is named twice."""
        if not len(a):
            return
        here, there = (np.concatenate([a, b]), np.concatenate([b, a])) if swap else (a, b)
        length, cached = int(self.rows["length"][there].max()), int(self.rows["cached"][there].max())
        self.rows[here] = self.rows[there]
        for held in (self.tokens, self.logprobs, self.versions, self.routing):
            if held is not None:
                held[here, :length] = held[there, :length]
        if not swap:
            self.rows[b] = np.zeros((), ROW)
        self._cache.copy(self._tensor(there), self._tensor(here), cached)
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            for names in (self.sessions, self.calls):
                names[i], names[j] = names[j], names[i]
        self._slot_of |= {session: slot for slot in here.tolist() if (session := self.sessions[slot]) is not None}

    def share(self, source: int, targets: list[int], length: int) -> None:
        """Copy what running the first ``length`` tokens gave from one slot to others that hold the same tokens.

        The source has no routing of earlier weights (``stale``) beyond what the targets have recorded.
        """
        target = np.array(targets)
        self._cache.copy(self._tensor(np.full(len(targets), source)), self._tensor(target), length)
        self.rows["cached"][target] = length
        if self.routing is not None:
            for slot in targets:
                first = int(self.rows["recorded"][slot])
                self.routing[slot, first:length] = self.routing[source, first:length]
                self.rows["recorded"][slot] = max(first, length)

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
