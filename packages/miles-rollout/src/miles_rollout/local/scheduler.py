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

PREFILL_TOKENS = 4096
"""Tokens of one prefill pass, padding included."""


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
    next is known already. Prefill runs many tokens of a sequence at once, up to its last, which decoding leaves to it.
    """

    def __init__(self, model: SlotModel, stops: Stops, max_slots: int, max_length: int) -> None:
        self.version = 0
        self.stats = Stats()
        self._model, self._stops = model, stops
        self._max_slots, self._max_length = max_slots, max_length
        self.reset()

    def reset(self) -> None:
        """Forget every session and waiting call."""
        self._slots = Slots(self._model.new_cache(), self._max_slots, self._max_length)
        self._waiting: deque[Call] = deque()

    @property
    def idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not self._waiting and not self._slots.rows["running"].any()

    def drop_caches(self) -> None:
        """After a change of weights: what is cached was computed by other ones."""
        self._slots.drop_caches()

    @torch.inference_mode()
    def step(self, arrivals: list[Call | Release]) -> list[tuple[Call, Generation]]:
        """Take what has arrived, in order, run one decoding step, and return the calls that it finished."""
        began = time.perf_counter()
        for arrival in arrivals:
            if isinstance(arrival, Release):
                self._forget(arrival.session)
            elif (slot := self._slots.find(arrival.request.session)) is not None:
                self._start(slot, arrival)
            else:
                self._waiting.append(arrival)
        while self._waiting and (slot := self._slots.claim(self._waiting[0].request.session)) is not None:
            self._start(slot, self._waiting.popleft())
        n = self._slots.gather_running()
        finished = []
        if n:
            self._slots.reserve(int(self._slots.rows["length"][:n].max()) + 1)
            self._prefill(n)
            finished = self._decode(n)
        self.stats.seconds_busy += time.perf_counter() - began
        return finished

    # ---- in and out ---------------------------------------------------------------------------------------------------

    def _forget(self, session: str) -> None:
        self._waiting = deque(call for call in self._waiting if call.request.session != session)
        if (slot := self._slots.find(session)) is not None:
            self._slots.release(slot)

    def _start(self, slot: int, call: Call) -> None:
        """Give a call its slot. Of what the slot holds, the tokens that begin the context stay cached."""
        request, sampling, slots = call.request, call.request.sampling, self._slots
        length = len(request.tokens)
        slots.reserve(length + 1)
        row = slots.rows[slot]
        known = min(int(row["cached"]), length - 1)
        same = slots.tokens[slot, :known] == request.tokens[:known]
        cached = known if same.all() else int(same.argmin())
        row["running"], row["cached"], row["recorded"] = True, cached, min(int(row["recorded"]), cached)
        row["context"], row["length"], row["end"] = length, length, min(length + sampling.max_tokens, self._max_length)
        row["key"], row["temperature"], row["top_p"] = request.key, sampling.temperature, sampling.top_p
        row["top_k"], row["min_p"] = sampling.top_k, sampling.min_p
        slots.tokens[slot, :length] = request.tokens
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

    def _prefill(self, n: int) -> None:
        """Run all but the last token of sequences that have many to run; the same tokens in several slots only once."""
        pending, rows = self._pending(np.arange(n)), self._slots.rows[:n]
        alike: dict[tuple[int, bytes], list[int]] = {}
        for slot in np.flatnonzero((pending > RIDING) | ((pending > 0) & (rows["cached"] == 0))).tolist():
            context = self._slots.tokens[slot, : rows["length"][slot] - 1].tobytes()
            alike.setdefault((int(rows["recorded"][slot]), context), []).append(slot)
        leaders = np.array([slots[0] for slots in alike.values()], np.int64)
        while (pending := self._pending(leaders)).any():
            longest_first = leaders[np.argsort(-pending, kind="stable")]
            self._prefill_pass(longest_first[: np.count_nonzero(pending)])
        for first, *others in alike.values():
            if others:
                self._slots.share(first, others, int(self._slots.rows["length"][first]) - 1)

    def _pending(self, slots: np.ndarray) -> np.ndarray:
        """int64 [n]: tokens that are to be run before the last."""
        rows = self._slots.rows
        return rows["length"][slots] - 1 - rows["cached"][slots]

    def _prefill_pass(self, slots: np.ndarray) -> None:
        """Run the next tokens of as many of the slots as fit; they come in falling order of what they have to run."""
        pending = self._pending(slots)
        columns = min(int(pending[0]), PREFILL_TOKENS)
        slots = slots[: PREFILL_TOKENS // columns]
        counts = np.minimum(pending[: len(slots)], columns)
        start = self._slots.rows["cached"][slots]
        self._slots.reserve(min(int(start.max()) + columns, self._max_length))
        # Shorter rows run on past their end, at most up to the last position; what they write is overwritten before it is seen.
        positions = np.minimum(start[:, None] + np.arange(columns), self._slots.tokens.shape[1] - 1)
        inputs = self._slots.tokens[slots[:, None], positions].astype(np.int64)
        _, routing = self._model.forward(slots, inputs, positions, wanted=slots[:0])
        if routing is not None:
            self._slots.record(slots, positions, counts, routing)
        self._slots.rows["cached"][slots] += counts
        self.stats.prefill_tokens += int(counts.sum())

    def _decode(self, n: int) -> list[tuple[Call, Generation]]:
        """Run one token of each running sequence, sample where it was the last, and finish those that end with it."""
        held, slots = self._slots, np.arange(n)
        rows = held.rows[:n]
        positions = rows["cached"].copy()
        last = np.flatnonzero(positions + 1 == rows["length"])
        logits, routing = self._model.forward(
            slots, held.tokens[slots, positions].astype(np.int64)[:, None], positions[:, None], wanted=last
        )
        if routing is not None:
            held.record(slots, positions[:, None], np.ones(n, np.int64), routing)
        rows["cached"] += 1
        self.stats.decode_steps += 1
        if not len(last):
            return []
        sampling = rows[last]
        index = sampling["length"]
        settings = Settings(sampling["temperature"], sampling["top_p"], sampling["top_k"], sampling["min_p"])
        drawn = draw(logits, settings, uniform(sampling["key"], index))
        held.tokens[last, index] = drawn.tokens
        held.logprobs[last, index] = drawn.logprobs
        held.versions[last, index] = self.version
        rows["length"][last] = index + 1
        self.stats.generated_tokens += len(last)
        calls = [held.calls[slot] for slot in last.tolist()]
        for i, ids in drawn.support.items():
            calls[i].support.append(ids)
        stopped = np.array([call.may_end[token] for call, token in zip(calls, drawn.tokens.tolist(), strict=True)])
        for i in np.flatnonzero(stopped):
            generated = held.tokens[last[i], sampling["context"][i] : index[i] + 1]
            stopped[i] = self._stops.ends(calls[i].request.sampling, generated)
        ended = stopped | (index + 1 >= sampling["end"])
        return [self._finish(int(last[i]), "stop" if stopped[i] else "length") for i in np.flatnonzero(ended)]
