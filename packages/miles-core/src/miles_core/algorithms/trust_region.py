"""Policy-gradient terms that bound something else than each token's ratio: a sequence's mean ratio, or a divergence.

Conventions as in ``losses``. A sequence is what one sample trains: where branches share a prefix, its tokens count in the branch
that trains them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..algorithm_configs.losses import Old
from ..protocols import LossInputs, LossOutputs
from .losses import advantages_of, drift, log_ratio_to, old_logprobs


def gspo(
    inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4, token_advantages: bool = False, old: Old = "recompute"
) -> LossOutputs:
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071): one length-normalised ratio a sequence.

    ``s = exp(mean over the sequence's trained tokens of log ρ)``, ``loss = −min(s·A, clip(s, 1 − clip_low, 1 + clip_high)·A)`` on each
    of its rows, so that aggregation ``sequence_mean`` gives the paper's mean over sequences (and ``sequence_mean_token_sum`` LUSPO,
    arXiv:2602.05261). A must be the same on all tokens of a sequence.

    With ``token_advantages`` (GSPO-token, section 4.3) the ratio at row t is ``sg(s)·π_t / sg(π_t)``: the same number, whose gradient
    stays with the row, so that each token may have an advantage of its own. For constant advantages under ``sequence_mean`` the
    gradient is the same too.
    """
    advantages = advantages_of(inputs)
    log_ratio = log_ratio_to(inputs, old)
    sequence = _sequence_mean(inputs, log_ratio)
    if token_advantages:
        sequence = sequence.detach() + (log_ratio - log_ratio.detach())
    ratio = sequence.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return LossOutputs(inputs.weighted(-torch.minimum(plain, clipped)), drift(log_ratio, clipped=clipped < plain))


def gmpo(inputs: LossInputs, *, clip_low: float = 0.4, clip_high: float = 0.4, old: Old = "recompute") -> LossOutputs:
    """Geometric-mean policy optimisation (Zhao et al. 2025, arXiv:2507.20673): each token's log-ratio is clipped, then averaged.

    ``s = exp(mean of min(log ρ, clip_high))`` where A > 0 and of ``max(log ρ, −clip_low)`` elsewhere; ``loss = −s·A`` on each row of
    the sequence. The bounds are of LOG-ratios, 0.4 in the paper. A must be the same on all tokens of a sequence; the paper's mean over
    sequences is aggregation ``sequence_mean``.
    """
    advantages = advantages_of(inputs)
    log_ratio = log_ratio_to(inputs, old)
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
    ratio = _sequence_mean(inputs, bounded).exp()
    return LossOutputs(inputs.weighted(-ratio * advantages), drift(log_ratio, clipped=bounded != log_ratio))


def dppo(
    inputs: LossInputs, *, divergence: Literal["tv", "kl"] = "tv", threshold: float | None = None, old: Old = "recompute"
) -> LossOutputs:
    """Divergence PPO (Qi et al. 2026, arXiv:2602.04879), binary form: masks by how far the distribution moved, not by the ratio.

    ``loss = −M·ρ·A``. M = 0 where the update would go on outward (A > 0 and ρ > 1, or A < 0 and ρ < 1) though the divergence between
    old and new, of "this token" against "any other", is above the threshold; else 1. ``tv``: ``|π − π_old|``, threshold 0.15;
    ``kl``: ``π_old·log(π_old/π) + (1 − π_old)·log((1 − π_old)/(1 − π))``, threshold 0.05 (the paper's, for None).

    The paper measures from what sampled: ``old: rollout``. verl writes −A·sg(ρ)·logp·M, which has the same gradient and another value.
    """
    advantages = advantages_of(inputs)
    log_ratio = log_ratio_to(inputs, old)
    new, before = inputs.logprobs.detach(), old_logprobs(inputs, old)
    moved = (new.exp() - before.exp()).abs() if divergence == "tv" else _binary_kl(before, new)
    far = moved > (threshold if threshold is not None else {"tv": 0.15, "kl": 0.05}[divergence])
    masked = far & torch.where(new > before, advantages > 0, (advantages < 0) & (new < before))
    loss = torch.where(masked, 0.0, -log_ratio.exp() * advantages)
    return LossOutputs(inputs.weighted(loss), drift(log_ratio, clipped=masked))


def _sequence_mean(inputs: LossInputs, x: Tensor) -> Tensor:
    """On each trained row the mean over those of its sequence; 0 on the others, so that nothing comes back from them to all."""
    return torch.where(inputs.ops.mask, inputs.ops.spread(inputs.ops.mean(x, "sequence")), 0.0)


def _binary_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL between two coins from the log-probabilities [N] of heads; 0·log 0 is 0.

    Tails of less than 1e-8 count as that many: a log-probability that rounding left at 0, or above, is not a certainty.
    """
    tails_old, tails_new = (-torch.expm1(x.clamp(max=0)) for x in (old, new))
    return old.exp() * (old - new) + torch.special.xlogy(tails_old, tails_old) - tails_old * tails_new.clamp(min=1e-8).log()
