"""Clip-Cov and KL-Cov (Cui et al. 2025, arXiv:2505.22617): spare the few tokens whose updates take most of the entropy away.

Entropy falls by the covariance of log-probability and advantage. A token's part in it is ``(logp − mean logp)·(A − mean A)``; a
few in ten thousand stand far out. Which tokens these are is a matter of the whole batch, and must not depend on how it is cut into
micro-batches: it is decided once, on the controller, from the log-probabilities before the first optimizer step, and the losses
read the column ``high_covariance``. (The paper's code decides in each micro-batch anew, with the current log-probabilities.)

The draws of Clip-Cov, and the order among equal covariances (tokens of probability 1), are counter-based: a function of the run's
seed, the sample and the position, not of the order of samples.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ..algorithm_configs.losses import Old
from ..batch import Batch
from ..errors import DataError
from ..protocols import LossInputs, LossOutputs
from ..randomness import key, uniform
from .losses import advantages_of, drift, log_ratio_to


def clip_cov(inputs: LossInputs, *, clip_low: float = 1.0, clip_high: float = 1.0, old: Old = "recompute") -> LossOutputs:
    """``loss = −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A)``, and 0 on the rows that ``drawn_between`` selected.

    Rows: [N]; selected rows stay in the denominators. ``clip_fraction`` counts them too.
    """
    advantages, selected = advantages_of(inputs), inputs.columns["high_covariance"].bool()
    log_ratio = log_ratio_to(inputs, old)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.where(selected, 0.0, -torch.minimum(plain, clipped))
    return LossOutputs(inputs.weighted(loss), drift(log_ratio, clipped=selected | (clipped < plain)))


def kl_cov(inputs: LossInputs, *, penalty: float = 1.0, old: Old = "recompute") -> LossOutputs:
    """``loss = −ρ·A``, plus ``penalty·|log ρ|`` on the rows that ``highest`` selected. Rows: [N].

    The paper writes KL(π_old ‖ π) for the penalty; |log ρ| is what its code takes. At ρ = 1 it has no gradient, so it acts from a
    batch's second optimizer step on. Metric: ``penalised_fraction``, the share of trained rows that were selected.
    """
    log_ratio, selected = log_ratio_to(inputs, old), inputs.columns["high_covariance"].bool()
    loss = torch.where(selected, penalty * log_ratio.abs(), 0.0) - log_ratio.exp() * advantages_of(inputs)
    return LossOutputs(inputs.weighted(loss), drift(log_ratio) | {"penalised_fraction": selected.to(log_ratio.dtype)})


def drawn_between(batch: Batch, seed: int, *, fraction: float, low: float, high: float, old: Old) -> np.ndarray:
    """bool [N]: ``fraction`` of the trained rows (at least one), drawn among those whose covariance is between ``low`` and ``high``.

    All of them where there are fewer. Raises DataError where a trained token has no old log-probability.
    """
    covariance = covariances(batch, old)
    candidates = np.flatnonzero((covariance > low) & (covariance < high))
    first = np.argsort(_draws(batch, seed)[candidates], kind="stable")
    return _chosen(batch, candidates[first], fraction)


def highest(batch: Batch, seed: int, *, fraction: float, old: Old) -> np.ndarray:
    """bool [N]: the ``fraction`` of the trained rows (at least one) with the highest covariances. Raises as ``drawn_between``."""
    covariance = covariances(batch, old)
    candidates = np.flatnonzero(batch.array("loss_mask"))
    first = np.lexsort((_draws(batch, seed)[candidates], -covariance[candidates]))
    return _chosen(batch, candidates[first], fraction)


def covariances(batch: Batch, old: Old) -> np.ndarray:
    """float64 [N]: ``(logp_old − mean)·(A − mean)``, means over the batch's trained rows; NaN on the other rows.

    Raises:
        DataError: A trained token has no such log-probability; names the sample.
    """
    mask, name = batch.array("loss_mask"), "logprobs" if old == "rollout" else "old_logprobs"
    logprobs, advantages = batch.array(name)[mask].astype(np.float64), batch.array("advantages")[mask].astype(np.float64)
    if (bad := ~np.isfinite(logprobs)).any():
        sample = batch.refs[batch.segment[mask][bad][0]].id
        raise DataError(f"selection by covariance: a trained token of sample {sample} has {name} {logprobs[bad][0]}; it needs a finite one")
    out = np.full(batch.n_rows, np.nan)
    # fsum is exact: the means, and with them what is selected, do not depend on the order of samples.
    count = max(len(logprobs), 1)
    out[mask] = (logprobs - math.fsum(logprobs) / count) * (advantages - math.fsum(advantages) / count)
    return out


def _draws(batch: Batch, seed: int) -> np.ndarray:
    """One number in [0, 1) a row, from seed, sample and position."""
    keys = np.array([key("covariance", seed, str(ref.id)) for ref in batch.refs], np.uint64)
    return uniform(keys[batch.segment], np.arange(batch.n_rows) - batch.cu_seqlens[batch.segment])


def _chosen(batch: Batch, ranked: np.ndarray, fraction: float) -> np.ndarray:
    """bool [N]: the first of the ranked rows, as many as ``fraction`` of the trained ones are, at least one."""
    selected = np.zeros(batch.n_rows, bool)
    selected[ranked[: max(int(fraction * batch.array("loss_mask").sum()), 1)]] = True
    return selected
