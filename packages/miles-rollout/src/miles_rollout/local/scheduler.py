"""Which sequences run: admission to slots, prefill, decoding steps, and what is handed back. Not thread-safe: one thread at a time."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from miles_core.protocols import GenerateRequest, Generation
from miles_core.randomness import uniform

from .model import SlotModel
from .sampling import Settings, draw
from .slots import Slots
from .stops import Stops

RIDING = 32
"""A session that comes back with at most this many new tokens runs them one by one in the decoding steps; more are prefilled."""

PATIENCE = 16
"""Decoding steps for which a context may wait for its next prefill pass while shorter ones go first."""

PREFILL_TOKENS = 1024
"""Tokens of one prefill pass, padding included. Longer contexts run in pieces, with a decoding step of the others after each."""


@dataclass(eq=False)
class Call:
    """A request in the engine.

    Attributes:
        request: What is asked for; checked.
        may_end: bool [V], tokens that may end it (``Stops.may_end``).
        reply: Where the caller waits. The scheduler only hands it back.
        support: Of each token sampled so far, where sampling is restricted.
    """

    request: GenerateRequest
    may_end: np.ndarray
    reply: Any
    support: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Release:
    """A session that is over, or whose caller does not wait any more."""

    session: str


@dataclass
class Stats:
    """What was done so far. ``seconds_busy`` is wall time in steps."""

    generated_tokens: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    seconds_busy: float = 0.0


class Scheduler:
    """Continuous batching over slots.

    One rule drives everything: of a sequence's ``length`` known tokens, ``cached`` have been run. A decoding step runs token
    ``cached`` of every running sequence; where that was the last known one, the next is sampled, elsewhere (injected tokens) the
    next is known already. Sequences with many such tokens are prefilled first: many at once, up to the last, which is for decoding.
    A finished sequence leaves its place to a waiting one before the next step.
    """

    def __init__(self, model: SlotModel, stops: Stops, max_slots: int, max_length: int) -> None:
        self.version = 0
        self.stats = Stats()
        self._model, self._stops = model, stops
        self._max_slots, self._max_length = max_slots, max_length
        self.reset()

    def reset(self) -> None:
        """Forget every session and waiting call."""
        self._model.cache.clear()
        self._slots = Slots(self._model.cache, self._max_slots, self._max_length)
        self._waiting: deque[Call] = deque()
        self._may_end = np.zeros(0, bool)  # tokens that may end any of the calls that run

    @property
    def idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not self._waiting and not self._slots.rows["running"].any()

    def drop_caches(self) -> None:
        """After a change of weights: what is cached was computed by other ones."""
        self._slots.drop_caches()

    @torch.inference_mode()
    def step(self, arrivals: list[Call | Release]) -> list[tuple[Call, Generation]]:
        """Take what has arrived, in order, run at most one prefill pass and one decoding step, and return the calls that are done."""
        began = time.perf_counter()
        self._admit(arrivals)
        to_prefill = self._to_prefill()
        if to_prefill.any():
            self._prefill(np.flatnonzero(to_prefill))
            to_prefill = self._to_prefill()
        finished = self._decode(self._slots.gather(self._slots.rows["running"] & ~to_prefill))
        self.stats.seconds_busy += time.perf_counter() - began
        return finished

    # ---- in and out ---------------------------------------------------------------------------------------------------

    def _admit(self, arrivals: list[Call | Release]) -> None:
        """Sessions that hold a slot go on in it; the others wait for one, in order."""
        started = False
        for arrival in arrivals:
            if isinstance(arrival, Release):
                self._forget(arrival.session)
            elif (slot := self._slots.find(arrival.request.session)) is not None:
                self._start(slot, arrival)
                started = True
            else:
                self._waiting.append(arrival)
        while self._waiting and (slot := self._slots.claim(self._waiting[0].request.session)) is not None:
            self._start(slot, self._waiting.popleft())
            started = True
        if started:
            distinct = {id(call.may_end): call.may_end for call in self._slots.calls if call is not None}
            self._may_end = np.logical_or.reduce(list(distinct.values()))

    def _forget(self, session: str) -> None:
        self._waiting = deque(call for call in self._waiting if call.request.session != session)
        if (slot := self._slots.find(session)) is not None:
            self._slots.release(slot)

    def _start(self, slot: int, call: Call) -> None:
        """Give a call its slot. Of what is cached, the tokens that begin the context stay so."""
        request, sampling, slots = call.request, call.request.sampling, self._slots
        slots.begin(slot, request.tokens)
        row, length = slots.rows[slot], len(request.tokens)
        row["used"] = self.stats.decode_steps
        row["running"], row["context"], row["end"] = True, length, min(length + sampling.max_tokens, self._max_length)
        row["key"], row["temperature"], row["top_p"] = request.key, sampling.temperature, sampling.top_p
        row["top_k"], row["min_p"] = sampling.top_k, sampling.min_p
        slots.calls[slot] = call

    def _finish(self, slot: int, finish: Literal["stop", "length"]) -> tuple[Call, Generation]:
        slots, row = self._slots, self._slots.rows[slot]
        call, slots.calls[slot] = slots.calls[slot], None
        sampled = slice(int(row["context"]), int(row["length"]))
        row["running"], row["used"] = False, self.stats.decode_steps
        routing = None if slots.routing is None else slots.routing[slot, call.request.routing_start : sampled.stop - 1].copy()
        columns = (held[slot, sampled].copy() for held in (slots.tokens, slots.logprobs, slots.versions))
        return call, Generation(*columns, finish=finish, routing=routing, support=call.support or None)

    # ---- forward passes -----------------------------------------------------------------------------------------------

    def _to_prefill(self) -> np.ndarray:
        """bool [slots]: running sequences that have many tokens to run before their last."""
        rows = self._slots.rows
        pending = rows["length"] - 1 - rows["cached"]
        return rows["running"] & ((pending > RIDING) | ((pending > 0) & (rows["cached"] == 0)))

    def _prefill(self, to_prefill: np.ndarray) -> None:
        """One pass over tokens before the last of these slots (int64 [n]); the same tokens in several slots only once."""
        slots = self._slots
        alike: dict[tuple[int, bytes], list[int]] = {}
        for slot in to_prefill[np.argsort(-slots.rows["cached"][to_prefill], kind="stable")].tolist():  # who has run most leads
            context = slots.tokens[slot, : slots.rows["length"][slot] - 1].tobytes()
            alike.setdefault((int(slots.rows["stale"][slot]), context), []).append(slot)
        self._prefill_pass(np.array([leader for leader, *_ in alike.values()]))
        done = ~self._to_prefill()
        for leader, *others in alike.values():
            if others and done[leader]:
                slots.share(leader, others, int(slots.rows["cached"][leader]))

    def _prefill_pass(self, slots: np.ndarray) -> None:
        """Run the next tokens of as many of the slots as fit, those with the fewest first: short contexts do not wait for long ones.

        One that has waited for ``PATIENCE`` steps has a pass for itself, and then waits anew.
        """
        held = self._slots
        used = held.rows["used"][slots]
        if self.stats.decode_steps - used.min() > PATIENCE:
            slots = slots[[used.argmin()]]
            held.rows["used"][slots] = self.stats.decode_steps
        pending = held.rows["length"][slots] - 1 - held.rows["cached"][slots]
        order = np.argsort(pending, kind="stable")
        slots, pending = slots[order], pending[order]
        fitting = max(1, int(np.count_nonzero(pending * np.arange(1, len(slots) + 1) <= PREFILL_TOKENS)))  # the product rises
        slots, counts = slots[:fitting], np.minimum(pending[:fitting], PREFILL_TOKENS)
        start, columns = held.rows["cached"][slots], int(counts[-1])
        held.reserve(min(int(start.max()) + columns, self._max_length))
        # Shorter rows run on past their end, at most up to the last position; what they write is overwritten before it is seen.
        positions = np.minimum(start[:, None] + np.arange(columns), held.tokens.shape[1] - 1)
        inputs = held.tokens[slots[:, None], positions].astype(np.int64)
        _, routing = self._model.forward(slots, inputs, positions, wanted=slots[:0])
        if routing is not None:
            held.record(slots, positions, counts, routing)
        held.rows["cached"][slots] += counts
        self.stats.prefill_tokens += int(counts.sum())

    def _decode(self, n: int) -> list[tuple[Call, Generation]]:
        """Run one token of the sequences in the first n slots, sample where it was the last, and finish those that end with it."""
        if not n:
            return []
        held = self._slots
        held.reserve(int(held.rows["length"][:n].max()) + 1)
        rows, slots = held.rows[:n], np.arange(n)
        positions = rows["cached"].copy()
        last = np.flatnonzero(positions + 1 == rows["length"])
        logits, routing = self._model.forward(
            slots, held.tokens[slots, positions].astype(np.int64)[:, None], positions[:, None], wanted=last
        )
        if routing is not None:
            held.record(slots, positions[:, None], np.ones(n, np.int64), routing)
        rows["cached"] += 1
        self.stats.decode_steps += 1
        return self._sample(last, logits) if len(last) else []

    def _sample(self, slots: np.ndarray, logits: torch.Tensor) -> list[tuple[Call, Generation]]:
        """Draw the next token of each of these slots from its row of logits [m, V], and finish those that end with it."""
        held = self._slots
        rows = held.rows[slots]
        index = rows["length"]
        drawn = draw(logits, Settings(rows["temperature"], rows["top_p"], rows["top_k"], rows["min_p"]), uniform(rows["key"], index))
        held.tokens[slots, index] = drawn.tokens
        held.logprobs[slots, index] = drawn.logprobs
        held.versions[slots, index] = self.version
        held.rows["length"][slots] = index + 1
        self.stats.generated_tokens += len(slots)
        for i, ids in drawn.support.items():
            held.calls[slots[i]].support.append(ids)
        stopped = self._may_end[drawn.tokens]
        for i in np.flatnonzero(stopped):
            generated = held.tokens[slots[i], rows["context"][i] : index[i] + 1]
            stopped[i] = self._stops.ends(held.calls[slots[i]].request.sampling, generated)
        ended = stopped | (index + 1 >= rows["end"])
        return [self._finish(int(slots[i]), "stop" if stopped[i] else "length") for i in np.flatnonzero(ended)]
