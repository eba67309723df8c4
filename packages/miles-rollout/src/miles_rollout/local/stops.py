"""Texts that end a generation, found as soon as they are complete."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np

from miles_core.errors import ConfigError
from miles_core.protocols import Tokenizer


class StopTexts:
    """Finds stop texts in what was generated.

    Decoding after every token would cost more than a small model's forward pass. So each token of the vocabulary is decoded once:
    only a token whose text holds the last character of a stop text can complete it, and only then is the tail decoded.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # used in the engine's thread, while others encode with theirs
        self._pieces: list[str] | None = None
        self.completing = lru_cache(maxsize=64)(self._completing)

    def _completing(self, stop: tuple[str, ...]) -> np.ndarray:
        """bool [vocabulary]: tokens that can complete one of these texts."""
        if self._tokenizer is None:
            raise ConfigError(f"stop texts {stop} need a tokenizer, and the local engine was built without one; stop at token ids instead")
        if self._pieces is None:
            self._pieces = [self._tokenizer.decode([token]) for token in range(len(self._tokenizer))]
        ends = {text[-1] for text in stop}
        if any(end.isspace() for end in ends):
            return np.ones(len(self._pieces), bool)  # white space may be shown only when the next token comes
        # U+FFFD stands for a part of a character, which a token may complete without showing it by itself.
        return np.array([any(c in ends or c == "\ufffd" for c in piece) for piece in self._pieces], bool)

    def complete(self, stop: tuple[str, ...], generated: np.ndarray) -> bool:
        """Whether one of the texts appears at the end of the generated tokens (int32 [n])."""
        assert self._tokenizer is not None
        length = max(len(text.encode()) for text in stop) + 4  # a token is at least a byte; some to spare for special tokens
        tail = self._tokenizer.decode(generated[-length:].tolist())
        return any(text in tail for text in stop)
