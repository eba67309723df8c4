"""Loss terms: pure functions of one micro-batch, a loss for each row [N]; aggregation is somebody else's.

With ρ = π / π_old = ``exp(logp − logp_old)`` at each row and A its advantage. All compute in the dtype of ``inputs.logprobs``, clamp
no log-ratio, and let nothing that stands on rows outside the mask, NaN or infinity, into value or gradient. A batch without a trained
row gives 0. What is a function of whole sequences is in ``trust_region``, selection by covariance in ``covariance``, pairs and
values in ``preference_losses``.

Policy-gradient terms report ``kl``, the k3 estimate of KL(π_old ‖ π), never negative but for rounding, and where they
bound the ratio ``clip_fraction``, the share of trained rows on which a bound is what counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithm_configs.losses import Old
from ..protocols import Kl, LossInputs, LossOutputs
from .kl import GUARD, k3


def ppo_clip(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None, old: Old = "recompute"
) -> LossOutputs:
    """Clipped surrogate (Schulman et al. 2017, arXiv:1707.06347), bounds apart as in DAPO (Yu et al. 2025, arXiv:2503.14476).

    ``loss = −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A)``; with ``dual_clip`` c (Ye et al. 2019, arXiv:1912.09729), where
    A < 0, at most c·|A|.

    Computed without a graph: by logp, −ρ·A has the derivative −ρ·A, and a bound has none.
    """
    with torch.no_grad():
        advantages, log_ratio = advantages_of(inputs), log_ratio_to(inputs, old)
        ratio = log_ratio.exp()
        plain = ratio * advantages
        surrogate = torch.minimum(plain, ratio.clamp_(1 - clip_low, 1 + clip_high) * advantages)
        if dual_clip is not None:
            surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
        clipped = surrogate != plain
        loss = inputs.weighted(-surrogate)
        slope = loss.masked_fill(clipped | ~inputs.ops.mask, 0.0)
    return LossOutputs(_WithSlope.apply(inputs.logprobs, loss, slope), drift(log_ratio, clipped))


def cispo(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.28, old: Old = "recompute") -> LossOutputs:
    """REINFORCE with a bounded, constant importance weight (MiniMax-M1, Chen et al. 2025, arXiv:2506.13585).

    ``loss = −sg(clip(ρ, 1 − clip_low, 1 + clip_high))·A·logp``. Every trained row has a gradient, clipped or not. The paper leaves
    the lower bound out in practice: that is ``clip_low = 1``.
    """
    log_ratio = log_ratio_to(inputs, old)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -weight * advantages_of(inputs) * trained_logprobs(inputs)
    return LossOutputs(inputs.weighted(loss), drift(log_ratio, clipped=weight != ratio))


def sapo(inputs: LossInputs, *, tau_positive: float = 1.0, tau_negative: float = 1.05, old: Old = "recompute") -> LossOutputs:
    """Soft adaptive policy optimisation (Gao et al. 2025, arXiv:2511.20347): a smooth gate in place of the clip.

    ``loss = −4/τ·σ(τ·(ρ − 1))·A`` with τ = tau_positive where A > 0, else tau_negative. At ρ = 1 its gradient is the policy
    gradient, and it fades on both sides, faster for a larger τ. (The value at ρ = 1 is −2·A/τ, not −A.) The paper takes the mean
    over sequences of token means: aggregation ``sequence_mean``.
    """
    advantages = advantages_of(inputs)
    log_ratio = log_ratio_to(inputs, old)
    tau = torch.where(advantages > 0, advantages.new_tensor(tau_positive), advantages.new_tensor(tau_negative))
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * (4 / tau)
    return LossOutputs(inputs.weighted(-gate * advantages), drift(log_ratio))


def dro(inputs: LossInputs, *, beta: float = 0.05, old: Old = "recompute") -> LossOutputs:
    """Policy gradient with a quadratic penalty on the log-ratio, without importance weights.

    ``loss = −(A·logp − β/2·(logp − logp_old)²)``. It is the policy's half of direct reward optimisation (Richemond et al. 2024,
    arXiv:2405.19107) and of Kimi k1.5 (arXiv:2501.12599), row by row as tinker's and verl's losses of this name are; the papers
    penalise the log-ratio of the whole answer, and take for A the reward less a soft value.
    """
    log_ratio = log_ratio_to(inputs, old)
    loss = beta / 2 * log_ratio.square() - advantages_of(inputs) * trained_logprobs(inputs)
    return LossOutputs(inputs.weighted(loss), drift(log_ratio))


def reinforce(inputs: LossInputs) -> LossOutputs:
    """Policy gradient (Williams 1992, "Simple statistical gradient-following algorithms"): ``loss = −A·logp``.

    No ratio, so from the second optimizer step of a batch on, or for tokens of older weights, it is off-policy and nothing bounds it;
    a correction weighs it all the same.
    """
    return LossOutputs(inputs.weighted(-advantages_of(inputs) * trained_logprobs(inputs)))


def opd(inputs: LossInputs) -> LossOutputs:
    """On-policy distillation: the policy gradient of the reverse KL to a teacher at each token.

    ``loss = sg(logp − logp_teacher)·logp``, whose gradient on samples of π is in expectation that of KL(π ‖ π_teacher) of each next
    token (Gu et al. 2023, arXiv:2306.08543, and Agarwal et al. 2023, arXiv:2306.13649, without the tokens after it). The value
    is not the divergence; the metric ``teacher_kl``, its k1 estimate, is.

    The advantage ``opd`` says the same with the weights before the step, fixed, so that a loss with a ratio and a bound can
    follow, and mixes with a reward. In a batch's first optimizer step the gradients are equal; this one follows the current weights.
    """
    logprobs = trained_logprobs(inputs)
    distance = logprobs.detach() - inputs.columns["teacher_logprobs"].to(logprobs.dtype)
    return LossOutputs(inputs.weighted(distance * logprobs), {"teacher_kl": distance})


def nll(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood of each trained token (SFT): ``loss = −logp``."""
    return LossOutputs(-inputs.logprobs)


def entropy(inputs: LossInputs) -> LossOutputs:
    """``loss = −H``, the entropy in nats of the distribution each token comes from; a positive coefficient is an entropy bonus."""
    return LossOutputs(-inputs.entropy)


def kl_loss(inputs: LossInputs, *, estimator: Kl = k3, unbiased: bool = False) -> LossOutputs:
    """Estimate of KL(π ‖ π_ref) at each row, by any of ``miles_core.algorithms.kl``.

    As a loss the estimators differ in their gradients (see there): k2's is right on samples of the present weights, k1's is 0 in
    expectation, k3's belongs to the forward divergence. With ``unbiased`` (DeepSeek-V3.2, arXiv:2512.02556) the estimate is multiplied
    by ρ = π / π_old, gradient and all: for k1 and k3 the result's gradient is that of KL(π ‖ π_ref) though π_old sampled.

    Metric: ``ref_kl_beyond_20``, the share of trained rows with |log π − log π_ref| > 20, where an unbounded estimator explodes and
    ``low_variance`` is held.
    """
    logprobs = trained_logprobs(inputs)
    reference = inputs.columns["ref_logprobs"].to(logprobs.dtype)
    loss = estimator(logprobs, reference)
    if unbiased:
        loss = log_ratio_to(inputs, "recompute").exp() * loss
    return LossOutputs(loss, {"ref_kl_beyond_20": (logprobs.detach() - reference).abs().gt(GUARD).to(loss.dtype)})


class _WithSlope(torch.autograd.Function):
    """``value`` [N] as a function of ``x`` [N] that has the derivative ``slope`` [N], where a graph would keep several columns."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None


# ---- what they share -----------------------------------------------------------------------------------------------------


def log_ratio_to(inputs: LossInputs, old: Old) -> Tensor:
    """``log π − log π_old`` [N], 0 on rows outside the mask; differentiable in the current log-probabilities."""
    return torch.where(inputs.ops.mask, inputs.logprobs - old_logprobs(inputs, old), 0.0)


def old_logprobs(inputs: LossInputs, old: Old) -> Tensor:
    """``log π_old`` [N] of the policy that the ratio divides by, constant; anything on rows outside the mask."""
    if old == "current":
        return inputs.logprobs.detach()
    return inputs.columns["old_logprobs" if old == "recompute" else "logprobs"].to(inputs.logprobs.dtype)


def trained_logprobs(inputs: LossInputs) -> Tensor:
    """The current log-probabilities [N], 0 on rows outside the mask, into which no gradient goes."""
    return torch.where(inputs.ops.mask, inputs.logprobs, 0.0)


def advantages_of(inputs: LossInputs) -> Tensor:
    """The advantages [N] in the dtype of the log-probabilities; anything on rows outside the mask."""
    return inputs.columns["advantages"].to(inputs.logprobs.dtype)


def drift(log_ratio: Tensor, clipped: Tensor | None = None) -> dict[str, Tensor]:
    """What policy-gradient terms report of a row: ``kl`` (k3 of old against new) and, given as bool [N], ``clip_fraction``."""
    moved = log_ratio.detach()
    metrics = {"kl": moved.exp() - 1 - moved}  # expm1 takes ten times as long, and its last digits are lost in the mean
    return metrics if clipped is None else {"clip_fraction": clipped.to(moved.dtype)} | metrics
