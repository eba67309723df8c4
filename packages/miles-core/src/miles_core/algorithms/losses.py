"""Loss terms: pure functions of one micro-batch, a loss for each row; aggregation is somebody else's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithm_configs.losses import Old
from ..protocols import LossInputs, LossOutputs


def ppo_clip(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, old: Old = "recompute") -> LossOutputs:
    """Clipped surrogate (Schulman et al. 2017, arXiv:1707.06347), bounds apart as in DAPO (Yu et al. 2025, arXiv:2503.14476).

    ``ρ = exp(logp − logp_old)``, ``loss = −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A)``. Rows: [N].

    Metrics: ``clip_fraction`` (the clipped branch is the smaller one), ``kl`` (k3 of old against new, never negative).
    Rows outside the mask may hold NaN: none of it comes back with the gradient.
    """
    columns = inputs.columns
    advantages = columns["advantages"].to(inputs.logprobs.dtype)
    log_ratio = log_ratio_to(inputs, old)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    with torch.no_grad():
        metrics = {"clip_fraction": (clipped < plain).to(ratio.dtype), "kl": torch.expm1(log_ratio) - log_ratio}
    return LossOutputs(inputs.weighted(-torch.minimum(plain, clipped)), metrics)


def log_ratio_to(inputs: LossInputs, old: Old) -> Tensor:
    """``log π − log π_old`` [N], 0 on rows outside the mask; differentiable in the current log-probabilities."""
    previous = {"recompute": "old_logprobs", "rollout": "logprobs"}
    old_logprobs = inputs.logprobs.detach() if old == "current" else inputs.columns[previous[old]]
    return torch.where(inputs.ops.mask, inputs.logprobs - old_logprobs, 0.0)


def nll(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood of each trained token: ``−logp``. Rows: [N]."""
    return LossOutputs(-inputs.logprobs)
