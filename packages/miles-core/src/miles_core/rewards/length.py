"""``reward: length``: a price for every token outside a range."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from ..plugins import RewardConfig
from ..sample import Sample


class Length(RewardConfig):
    """Options of ``reward: length``: ``−per_token · (tokens below min_tokens + tokens above max_tokens)``, 0 within the range.

    With both at one number it is the length term of L1-Exact (Aggarwal & Welleck 2025, arXiv:2503.04697, equation 1).
    """

    point: ClassVar[str] = "reward"
    target: ClassVar[str] = "miles_core.rewards.length:length"

    per_token: float = Field(gt=0, allow_inf_nan=False)
    """Price of one token."""
    min_tokens: int | None = Field(None, gt=0)
    """Fewer sampled tokens cost."""
    max_tokens: int | None = Field(None, ge=0)
    """More sampled tokens cost."""

    @model_validator(mode="after")
    def _there_is_a_range(self) -> Self:
        if self.min_tokens is None and self.max_tokens is None:
            raise ValueError("neither min_tokens nor max_tokens is given; give one, or both")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}; swap them")
        return self


def length(sample: Sample, *, per_token: float, min_tokens: int | None, max_tokens: int | None) -> float:
    """``−per_token · (max(min_tokens − n, 0) + max(n − max_tokens, 0))`` for n sampled tokens; see ``Length``.

    Prompt and injected tokens do not count. Of a trajectory of several samples it is the last.
    """
    n = sample.n_sampled
    missing = 0 if min_tokens is None else max(min_tokens - n, 0)
    extra = 0 if max_tokens is None else max(n - max_tokens, 0)
    return per_token * -(missing + extra)
