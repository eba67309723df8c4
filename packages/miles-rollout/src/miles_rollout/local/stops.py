"""What ends a generation: ids, and texts as soon as they are complete."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np

from miles_core.errors import ConfigError
from miles_core.protocols import SamplingParams, Tokenizer


class Stops:
    """Tells whether the token just sampled ends its generation.

    Decoding after every token would cost more than a small model's forward pass. So each token of the vocabulary is decoded once:
    only a token whose text holds the last character of a stop text can complete it, and only then is the tail decoded.
    """

    def __init__(self, tokenizer: Tokenizer | None, end_of_text: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # used in the engine's thread, while others encode with theirs
        self._end_of_text, self._vocab_size = end_of_text, vocab_size
        self._pieces: list[str] | None = None
        self._may_end = lru_cache(maxsize=64)(self._tokens_that_may_end)

    def may_end(self, sampling: SamplingParams) -> np.ndarray:
        """bool [V]: tokens that can end a generation; for all others ``ends`` need not be asked.

        Raises:
            ConfigError: There are stop texts and no tokenizer.
        """
        return self._may_end(sampling.stop, sampling.stop_token_ids)

    def _tokens_that_may_end(self, stop: tuple[str, ...], stop_token_ids: tuple[int, ...]) -> np.ndarray:
        may_end = np.isin(np.arange(self._vocab_size), [*self._end_of_text, *stop_token_ids])
        if stop:
            completing = self._completing(stop)[: self._vocab_size]
            may_end[: len(completing)] |= completing
        return may_end

    def _completing(self, stop: tuple[str, ...]) -> np.ndarray:
        if self._tokenizer is None:
            raise ConfigError(f"stop texts {stop} need a tokenizer, and the local engine was built without one; stop at token ids instead")
        if self._pieces is None:
            self._pieces = [self._tokenizer.decode([token]) for token in range(len(self._tokenizer))]
        ends = {text[-1] for text in stop}
        if any(end.isspace() for end in ends):
            return np.ones(len(self._pieces), bool)  # white space may show only when the next token comes
        # U+FFFD stands for a part of a character, which a token may complete without showing it by itself.
        return np.array([any(c in ends or c == "\ufffd" for c in piece) for piece in self._pieces], bool)

    def ends(self, sampling: SamplingParams, generated: np.ndarray) -> bool:
        """Whether the last of the generated tokens (int32 [n]) ends the generation."""
        if generated[-1] in self._end_of_text or generated[-1] in sampling.stop_token_ids:
            return True
        if not sampling.stop or self._tokenizer is None:
            return False
        length = max(len(text.encode()) for text in sampling.stop) + 4  # a token is at least a byte; some to spare for special tokens
        tail = self._tokenizer.decode(generated[-length:].tolist())
        return any(text in tail for text in sampling.stop)
