"""Corrections between what sampled and what is trained: weights for rows, and rows that leave the batch.

With ``w = π_trainer / π_rollout`` at each trained row: the trainer's weights before the batch's first optimizer step over the engine
that sampled. It is 1 but for numerics (precision, kernels, MoE routing) and age (versions since the token was sampled). Everything is
float64, computed once on the whole batch and constant under the gradient; a policy-gradient term multiplies its rows by the
weights. What is given on rows outside the mask means nothing. Two ways to be out of bounds:

* weight 0: the row (token, sequence) teaches nothing but stays in the denominators, so the step becomes smaller;
* out of the batch (``keep``): the denominators are counted anew, and other loss terms (KL, entropy) lose the row too.

A *sequence* is what one sample trains: where branches share a prefix, its rows count in the branch that trains them. A
log-probability of −inf on the rollout's side makes w infinite: it is truncated, out of bounds or of infinite divergence like any other,
and only a bound of ``.inf`` leaves it, which ``credit.corrected`` then refuses with the sample's name. Where both sides are −inf, w is 1. A
sequence that has w's of 0 and of ∞ has no product or mean: it is out of every bound, and ``tis`` of that level has no weight to give.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..algorithm_configs.corrections import Level, Reduce, Statistic
from ..protocols import CorrectionInputs, CorrectionOutputs
from .segments import SegmentOps


def tis(inputs: CorrectionInputs, *, level: Level = "token", low: float = 0.0, high: float = 2.0) -> CorrectionOutputs:
    """Truncated importance sampling (Yao et al. 2025, fengyao.notion.site/off-policy-rl): weights ``clip(w, low, high)``.

    At ``level`` token each row has its own w (biased, low variance); sequence: the product over the sequence's trained rows on each
    of them (the unbiased one, high variance); geometric: the geometric mean. [0, 2] at token level is verl's and slime's default.

    With ``high = .inf`` at token level nothing is truncated, and with ppo_clip of ``old: recompute`` this is decoupled PPO (Hilton et al.
    2021, arXiv:2110.00641; AReaL, Fu et al. 2025, arXiv:2505.24298): behaviour = the rollout, proximal = the trainer before the step,
    current; ``π_proximal/π_behaviour · min(ρ·A, clip(ρ)·A)`` with ``ρ = π/π_proximal``.

    Metrics: ``weight_mean``, ``ess`` (effective sample size, (Σw)² / (n·Σw²)), ``truncated`` (share of rows).
    """
    ratio = _ratio(inputs, level)
    weights = ratio.clamp(low, high)
    metrics = _weight_metrics(weights, inputs.ops.mask) | {"truncated": _share(weights != ratio, inputs.ops)}
    return CorrectionOutputs(weights, metrics=metrics)


def mis(inputs: CorrectionInputs, *, level: Level = "token", low: float = 0.5, high: float = 2.0) -> CorrectionOutputs:
    """Masked importance sampling (Liu et al. 2025, "When Speed Kills Stability", richardli.xyz/rl-collapse): outside → out of the batch.

    Rows (at level sequence or geometric: whole sequences) with w outside [low, high] leave the batch and its denominators; the others
    have weight w. That is ``mis_mode: mask`` with bounds [0.5, 2] in slime, and verl's rejection with the same bounds beside its
    weights; AReaL's ``action: mask`` leaves the denominators as they were. ``icepop`` is the form that stays in them.

    Metrics, over what stays: ``weight_mean``, ``ess``; shares of rows ``below``, ``above``.
    """
    ratio = _ratio(inputs, level)
    keep = _inside(ratio, low, high)
    metrics = _weight_metrics(ratio, inputs.ops.mask & keep)
    metrics |= {"below": _share(ratio < low, inputs.ops), "above": _share(ratio > high, inputs.ops)}
    return CorrectionOutputs(torch.where(keep, ratio, 0.0), keep, metrics)


def icepop(inputs: CorrectionInputs, *, low: float = 0.5, high: float = 5.0) -> CorrectionOutputs:
    """IcePop (Ring-1T, Ling Team 2025, arXiv:2510.18855): weight w where low ≤ w ≤ high, 0 elsewhere.

    Rows of weight 0 stay in the denominators, as in the paper's mean over all tokens. [0.5, 5] is the range of its authors, of
    OpenRLHF and of NeMo-RL; prime-rl has [0.2, 5].

    Metrics: ``weight_mean``, ``ess``, ``masked`` (share of rows).
    """
    ratio = _ratio(inputs, "token")
    inside = _inside(ratio, low, high)
    return _gated(ratio, inside, inputs.ops)


def sequence_mask_tis(inputs: CorrectionInputs, *, low: float = 0.999, high: float = 1.002) -> CorrectionOutputs:
    """Token weights w, not truncated, for sequences whose geometric mean of w is within [low, high]; weight 0 on the others.

    Gated sequences stay in the denominators. As in OpenRLHF and NeMo-RL ("seq-mask-tis"); the bounds are NeMo-RL's for a trainer
    and an engine with the same weights. OpenRLHF shares [0.5, 5] with its token forms, a gate that hardly ever closes: widen ours
    towards it where tokens may be older than the trainer's weights.

    Metrics: ``weight_mean``, ``ess``, ``masked`` (share of rows).
    """
    inside = _inside(_ratio(inputs, "geometric"), low, high)
    return _gated(_ratio(inputs, "token"), inside, inputs.ops)


def veto(inputs: CorrectionInputs, *, threshold: float = 1e-4) -> CorrectionOutputs:
    """A sequence with any trained row of ``w < threshold`` leaves the batch and its denominators; no weights.

    1e-4 is slime's (``mis_veto_threshold``) and the looser end of what verl's documentation names. Only tokens that the trainer finds
    too unlikely veto; the other direction is a matter of truncation or of ``reject``.

    Metrics: ``tokens``, the share of rows that veto.
    """
    ops = inputs.ops
    vetoes = _log_ratio(inputs) < math.log(threshold)
    keep = ops.spread(ops.sum(vetoes.double()) == 0)
    return CorrectionOutputs(keep=keep, metrics={"tokens": _share(vetoes, ops)})


def reject(inputs: CorrectionInputs, *, threshold: float, statistic: Statistic = "k3", reduce: Reduce = "mean") -> CorrectionOutputs:
    """Sequences whose divergence, summed, averaged or at its largest token, is above the threshold leave the batch; no weights.

    With d = log w the statistics estimate KL(π_rollout ‖ π_trainer): ``k1 = −d``, ``k2 = d²/2``, ``k3 = w − 1 − d``. k1 has a sign, so
    its sum or mean, or each token's for ``max``, counts by its magnitude: both directions are rejected alike. These are verl's
    ``seq_{sum,mean,max}_{k1,k2,k3}`` (max of k1 is ours), where a single number u for k1 stands for the ratios [1/u, u]: here log u.
    ``reduce = "none"`` judges each row by itself (verl's ``token_*``).

    Metrics: ``rows``, the share rejected (0 where nothing is trained).
    """
    ops, d = inputs.ops, _log_ratio(inputs)
    divergence = {"k1": -d, "k2": d.square() / 2, "k3": torch.expm1(d) - d}[statistic]  # k3 of ∞ is NaN, which is outside too
    if reduce == "none":
        keep = _inside(divergence, -threshold, threshold)
    elif reduce == "max":
        keep = ops.spread(ops.sum((~_inside(divergence, -threshold, threshold)).double()) == 0)
    else:
        reduced = ops.sum(divergence) if reduce == "sum" else ops.mean(divergence)
        keep = ops.spread(_inside(reduced, -threshold, threshold))
    return CorrectionOutputs(keep=keep, metrics={"rows": _share(~keep, ops)})


def off_policy_mask(inputs: CorrectionInputs, *, threshold: float) -> CorrectionOutputs:
    """Off-policy sequence masking (DeepSeek-V3.2, arXiv:2512.02556): weight 0 where A < 0 and the sequence is far off.

    Far: the mean over the sequence's trained rows of ``log π_rollout − log π_trainer`` is above the threshold. Positive examples
    teach however far they are. Masked rows stay in the denominators, as in the paper's objective, TRL and slime.

    The paper measures with the current policy at every update; here it is measured once, before the batch's first optimizer step,
    and then fixed: what the batch's own updates add to the distance is left to the loss's clip.

    Metrics: ``masked`` (share of rows).
    """
    ops = inputs.ops
    near = ops.spread(_inside(ops.mean(-_log_ratio(inputs)), -math.inf, threshold))
    masked = (inputs.advantages < 0) & ~near
    return CorrectionOutputs(torch.where(masked, 0.0, torch.ones_like(inputs.trainer)), metrics={"masked": _share(masked, ops)})


# ---- what they share -----------------------------------------------------------------------------------------------------


def _log_ratio(inputs: CorrectionInputs) -> Tensor:
    """``log w`` [N]; 0 where both log-probabilities are the same, −inf too; anything outside the mask."""
    return torch.where(inputs.trainer == inputs.rollout, 0.0, inputs.trainer - inputs.rollout)


def _ratio(inputs: CorrectionInputs, level: Level) -> Tensor:
    """w [N] at a level."""
    ops, d = inputs.ops, _log_ratio(inputs)
    if level == "token":
        return d.exp()
    return ops.spread(ops.sum(d) if level == "sequence" else ops.mean(d)).exp()


def _inside(x: Tensor, low: float, high: float) -> Tensor:
    """``low ≤ x ≤ high``; NaN is outside."""
    return (x >= low) & (x <= high)


def _gated(ratio: Tensor, inside: Tensor, ops: SegmentOps) -> CorrectionOutputs:
    """Weights that are the ratio inside and 0 outside."""
    weights = torch.where(inside, ratio, 0.0)
    return CorrectionOutputs(weights, metrics=_weight_metrics(weights, ops.mask) | {"masked": _share(~inside, ops)})


def _share(rows: Tensor, ops: SegmentOps) -> float:
    """Share of the trained rows that are among ``rows`` (bool [N])."""
    return float(ops.mean(rows.double(), "global"))


def _weight_metrics(weights: Tensor, rows: Tensor) -> dict[str, float]:
    """Mean and effective sample size (1 if all are alike, 0 if none is above 0) of the weights of these rows (bool [N])."""
    weights = weights[rows]
    if not len(weights):
        return {"weight_mean": 0.0, "ess": 0.0}
    scaled = weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)  # squares of large weights would overflow
    ess = scaled.sum().square() / (len(scaled) * scaled.square().sum().clamp(min=torch.finfo(weights.dtype).tiny))
    return {"weight_mean": float(weights.mean()), "ess": float(ess)}
