"""Estimators of KL(π ‖ π_ref) from the log-probabilities of tokens that π sampled (Schulman 2020, "Approximating KL divergence").

All take float [N] in nats and give float [N] of the same dtype, differentiable in ``logprobs``; with d = log π − log π_ref. They are
element-wise: what stands on a row outside the mask stays there, and who calls them keeps NaN away from the gradient.

In the reward an estimate is a number, and k1 gives the gradient of the divergence. In the loss its own gradient counts, whose mean
on samples of π is that of KL(π ‖ π_ref) for k2, 0 for k1, and that of KL(π_ref ‖ π), the forward divergence, for k3 (Liu et al. 2025,
arXiv:2510.01555; Shah et al. 2025, arXiv:2512.21852). The loss term ``kl`` mends k1 and k3 with ``unbiased``.
"""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 20.0
"""Log-ratios beyond ± this are what a guard against overflow may change."""


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``d``. Unbiased, high variance, may be negative; as a loss its gradient is 0 in expectation."""
    return logprobs - reference


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``d² / 2``. Biased, low variance, never negative; as a loss on samples of π its gradient is that of the divergence."""
    return (logprobs - reference).square() / 2


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``exp(−d) − 1 + d``. Unbiased, low variance, never negative; as a loss its gradient is that of the forward divergence.

    Not bounded: a token that π has nearly given up (d ≪ 0) counts exp(−d).
    """
    d = logprobs - reference
    return torch.expm1(-d) + d


def absolute(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``|d|``. Biased, never negative; as a loss every token pulls with the same strength, and one with d = 0 not at all."""
    return (logprobs - reference).abs()


def low_variance(logprobs: Tensor, reference: Tensor) -> Tensor:
    """k3 with d held within ±20, so that it cannot overflow: the same number below that, beyond it constant and without gradient.

    The estimator called low_var_kl in verl and slime also caps its value at 10 (outside −2.6 < d < 11 or so), where its gradient
    becomes 0: tokens that drifted farthest are not pulled back. Here nothing below |20| is changed, and the loss term ``kl``
    reports how many tokens are beyond.
    """
    d = (logprobs - reference).clamp(-GUARD, GUARD)
    return torch.expm1(-d) + d
