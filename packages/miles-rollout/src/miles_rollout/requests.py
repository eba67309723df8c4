"""What every engine asks of a request before it does anything with it."""

from __future__ import annotations

import numpy as np

from miles_core.errors import DataError
from miles_core.protocols import GenerateRequest


def check_request(request: GenerateRequest, vocab_size: int, max_length: int) -> None:
    """Raise a DataError that names the session unless an engine with this vocabulary and length can take the request."""
    who, tokens = f"session {request.session!r}", request.tokens
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int32 or tokens.ndim != 1:
        raise DataError(f"{who}: the context must be an int32 array [T]")
    if len(tokens) == 0:
        raise DataError(f"{who}: the context is empty; give at least one token to start from")
    if len(tokens) >= max_length:
        room = f"which leaves no room: the engine takes {max_length} in all"
        raise DataError(f"{who}: the context has {len(tokens)} tokens, {room}; max_prompt_tokens and too_long of the data bound prompts")
    outside = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(outside):
        index = int(outside[0])
        raise DataError(f"{who}: token {tokens[index]} at index {index} is outside the vocabulary of {vocab_size}")
    if not _in_range(request):
        raise DataError(f"{who}: sampling settings, key or routing_start are out of range in {request}")


def _in_range(request: GenerateRequest) -> bool:
    s = request.sampling
    drawn = (s.temperature == 0 or 1e-4 <= s.temperature < 1e4) and 0 < s.top_p <= 1 and s.top_k >= 0 and 0 <= s.min_p <= 1
    return (
        drawn and s.max_tokens >= 1 and "" not in s.stop and 0 <= request.key < 2**64 and 0 <= request.routing_start <= len(request.tokens)
    )
