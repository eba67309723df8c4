"""The learning rate of an optimizer step."""

from __future__ import annotations

import math

from .plugins import AdamWTrainerConfig


def learning_rate(config: AdamWTrainerConfig, step: int, total: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``total``.

    It rises linearly over ``warmup_steps`` (the first step already learns: it has lr / warmup_steps), then stays, or falls
    from ``lr`` to ``final_lr_ratio · lr`` along a line or half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983). Beyond
    ``total`` it stays where it ended. A constant schedule does not look at ``total``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    left = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)
