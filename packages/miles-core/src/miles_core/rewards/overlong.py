"""``reward: overlong``: DAPO's soft penalty for answers that come near the length limit."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from ..sample import Sample


def _fits(buffer_tokens: int, said: ValidationInfo) -> int:
    limit = said.data.get("max_tokens")
    if limit is not None and buffer_tokens > limit:
        raise ValueError(f"the buffer is longer than max_tokens, {limit}; lower it")
    return buffer_tokens


Buffer = Annotated[int, Field(gt=0), AfterValidator(_fits)]


def overlong(sample: Sample, *, max_tokens: Annotated[int, Field(gt=0)], buffer_tokens: Buffer) -> float:
    """0 up to ``max_tokens − buffer_tokens`` sampled tokens, −1 from ``max_tokens`` on, a straight line between (Yu et al. 2025,
    arXiv:2503.14476, equation 13; there 20480 and 4096). A part of the reward: it is added to what says whether the answer is right.

    Args:
        sample: Prompt and injected tokens do not count. Of a trajectory of several samples it is the last.
        max_tokens: Usually the rollout's ``sampling.max_tokens``.
        buffer_tokens: How long the penalty grows, at most ``max_tokens``.
    """
    over = sample.n_sampled - (max_tokens - buffer_tokens)
    return -min(max(over / buffer_tokens, 0.0), 1.0)
