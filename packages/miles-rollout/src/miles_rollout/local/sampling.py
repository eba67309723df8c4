"""Drawing tokens: one uniform number each, so that a sample depends on its key and its distribution, never on its batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from miles_core.errors import RunError
from miles_kernels.ops.linear_logprob import exponentials, logprob_of_logits


@dataclass(frozen=True)
class Settings:
    """How each of n rows is drawn, as arrays [n]: float64 ``temperature``, ``top_p``, ``min_p``, int64 ``top_k`` (see SamplingParams)."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray


@dataclass(frozen=True)
class Draw:
    """What was drawn.

    Attributes:
        tokens: int64 [n].
        logprobs: float32 [n], under the distribution drawn from: scaled by temperature, renormalised over the support. Greedy
            tokens (temperature 0) have theirs under temperature 1, since greedy choice has no distribution.
        support: The ids that a row could be drawn from, in rising order, by row; only of rows that were restricted.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    support: dict[int, list[int]]


def draw(logits: Tensor, settings: Settings, uniforms: np.ndarray) -> Draw:
    """One token for each row, by inverting its cumulative distribution.

    The order of restrictions is that of transformers: temperature, top_k, top_p over what top_k left, min_p. Greedy rows ignore them.

    Args:
        logits: [n, V].
        settings: Of each row.
        uniforms: float64 [n] in [0, 1).

    Raises:
        RunError: A row's logits are not finite.
    """
    greedy = settings.temperature == 0
    temperature = np.where(greedy, 1.0, settings.temperature).astype(np.float32)
    logits = logits.float()
    scaled = logits if (temperature == 1).all() else logits / _column(temperature, logits)
    support: dict[int, list[int]] = {}
    restricted = ~greedy & ((settings.top_p < 1) | (settings.top_k > 0) | (settings.min_p > 0))
    if restricted.any():
        rows = np.flatnonzero(restricted)
        rows_t = torch.from_numpy(rows).to(logits.device)
        kept = _support(scaled[rows_t], settings, rows)
        scaled = scaled.index_copy(0, rows_t, scaled[rows_t].masked_fill_(~kept, -torch.inf))
        for row, mask in zip(rows.tolist(), kept.cpu().numpy(), strict=True):
            support[row] = np.flatnonzero(mask).tolist()
    largest, weights = exponentials(scaled)
    tokens = _invert(weights[: len(scaled)], uniforms)
    if greedy.any():
        tokens = torch.where(torch.from_numpy(greedy).to(logits.device), scaled.argmax(dim=-1), tokens)
    # By the very steps of the trainer's op: torch.log_softmax has other last bits.
    chosen = logprob_of_logits(scaled, tokens, largest, weights).cpu().numpy()
    if not np.isfinite(chosen).all():
        raise RunError("the policy's logits are not finite (NaN or infinity): its weights have diverged. Lower the learning rate.")
    return Draw(tokens.cpu().numpy(), chosen, support)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)[:, None]


def _invert(weights: Tensor, uniforms: np.ndarray) -> Tensor:
    """int64 [n]: the first token at which the cumulative weight ([n, V]) exceeds ``uniform`` · total; summed in float64."""
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    below_one = uniforms * (1 - 2.0**-52)  # so that no product rounds up to the total
    target = _column(below_one, weights) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)  # clamp: rows of NaN


def _support(logits: Tensor, settings: Settings, rows: np.ndarray) -> Tensor:
    """bool [m, V]: which tokens may be drawn. At a tie the lower id comes first; at least the likeliest token stays."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    top_p, min_p = settings.top_p[rows], settings.min_p[rows]
    top_k = np.where(settings.top_k[rows] > 0, settings.top_k[rows], logits.shape[1])
    kept = torch.arange(logits.shape[1], device=logits.device) < _column(top_k, logits)
    probs = torch.softmax(ordered.double(), dim=-1) * kept
    probs /= probs.sum(dim=-1, keepdim=True)
    before = probs.cumsum(dim=-1) - probs
    kept &= before < _column(np.where(top_p < 1, top_p, np.inf), logits)
    kept &= probs >= _column(min_p, logits) * probs[:, :1]
    return torch.zeros_like(kept).scatter_(1, order, kept)
