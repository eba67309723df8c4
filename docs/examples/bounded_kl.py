"""kl: an estimate of the divergence from a reference, token by token; for the reward or for the loss ``kl``.

In a recipe:

    models:
      policy: {kl_reward: {estimator: "bounded_kl:bounded_kl", coefficient: 0.01}}
      reference: {role: reference, trainer: torch}
"""

import torch


def bounded_kl(logprobs, reference, *, most: float = 2.0):
    """``k1`` that no single token can dominate. Both are float [N], in nats; so is what comes back."""
    return most * torch.tanh((logprobs - reference) / most)
