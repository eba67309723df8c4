"""One generation put together from the requests it took: more than one where weights changed in between."""

from __future__ import annotations

from typing import Literal

import numpy as np

from miles_core.protocols import GenerateRequest, Generation, SamplingParams

from ..local.stops import Stops
from .answers import Generated
from .shape import ModelShape


class Continuation:
    """What a generation has so far, and what is still to be asked for."""

    def __init__(self, request: GenerateRequest, model: ModelShape, stops: Stops, max_length: int) -> None:
        """Raises ConfigError if there are stop texts and no tokenizer."""
        self._request, self._model, self._stops = request, model, stops
        self._end = min(len(request.tokens) + request.sampling.max_tokens, max_length)
        self._may_end = stops.may_end(request.sampling)
        self._parts: list[Generated] = []
        self._finish: Literal["stop", "length", "abort"] | None = None
        self.tokens = request.tokens

    @property
    def ended(self) -> bool:
        """Whether nothing is to be asked for any more."""
        return self._finish is not None

    @property
    def sampling(self) -> SamplingParams:
        """How to draw."""
        return self._request.sampling

    @property
    def room(self) -> int:
        """Tokens it may still get."""
        return self._end - len(self.tokens)

    @property
    def routing_start(self) -> int:
        """First routing row that is not there yet: the last token's, once something was sampled."""
        return max(self._request.routing_start, len(self.tokens) - 1) if self._parts else self._request.routing_start

    def add(self, generated: Generated, resumes: bool) -> None:
        """What a request gave; ``resumes``: it was taken back if it was aborted, and the next one goes on from there."""
        if len(generated.tokens):
            self._parts.append(generated)
            self.tokens = np.concatenate([self.tokens, generated.tokens])
        cut = self._first_stop()
        if cut is not None:
            self.tokens = self.tokens[:cut]
            self._finish = "stop"
        elif generated.finish != "abort" or not resumes:
            self._finish = generated.finish
        elif self.room == 0:
            self._finish = "length"

    def _first_stop(self) -> int | None:
        """Length of the sequence up to the first end: an id that ends it, or the token that completes a stop text.

        SGLang looks for a text in as many tokens as its tokenizer would write it with; a policy may take more of them. And a request that
        is taken back says so, even if its last token ended it.
        """
        start, sampling = len(self._request.tokens), self._request.sampling
        for index in np.flatnonzero(self._may_end[self.tokens[start:]]).tolist():
            if self._stops.ends(sampling, self.tokens[start : start + index + 1]):
                return start + index + 1
        return None

    def result(self) -> Generation:
        """All of it, once it ended."""
        assert self._finish is not None
        start, n = len(self._request.tokens), len(self.tokens) - len(self._request.tokens)
        rows = max(len(self.tokens) - 1 - self._request.routing_start, 0)
        return Generation(
            tokens=self.tokens[start:],
            logprobs=np.concatenate([np.zeros(0, np.float32), *(part.logprobs for part in self._parts)])[:n],
            versions=np.concatenate([np.zeros(0, np.int32), *(part.versions for part in self._parts)])[:n],
            finish=self._finish,
            routing=self._routing(rows) if self._model.moe_layers else None,
            support=[ids for part in self._parts for ids in part.support or []][:n] if self._restricted() else None,
        )

    def _routing(self, rows: int) -> np.ndarray:
        none = np.zeros((0, len(self._model.moe_layers), self._model.top_k), self._model.routing_dtype)
        return np.concatenate([none, *(part.routing for part in self._parts if part.routing is not None)])[:rows]

    def _restricted(self) -> bool:
        return bool(self._parts) and self._parts[0].support is not None
