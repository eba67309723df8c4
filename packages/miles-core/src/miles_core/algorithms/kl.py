"""Estimators of KL(π ‖ π_ref) from the log-probabilities of tokens that π sampled (Schulman 2020, "Approximating KL divergence").

All take float [N] in nats and give float [N], differentiable in ``logprobs``.
"""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """``log π − log π_ref``. Unbiased, high variance, may be negative; as a loss its gradient is 0 in expectation."""
    return logprobs - reference
