"""Filters: plain functions that give None to keep, or the reason to drop. Torch-free.

A group filter drops a group with nothing to learn from; the producer replaces it by a new prompt. It sees what the rewards of
samples and groups gave; those of a whole batch come later. A sample filter only clears a sample's loss mask: the trajectory's reward
still counts in the statistics of its group.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from .sample import Group, Sample, Status


def zero_variance(group: Group, *, threshold: Annotated[float, Field(ge=0)] = 0.0) -> str | None:
    """Drops a group whose rewards are all the same: every group-relative advantage in it is 0 (dynamic sampling, arXiv:2503.14476).

    Args:
        group: Its trajectories, each counted once. One of several policies is dropped when this is so for each of them.
        threshold: Two rewards are the same when they differ by at most this.
    """
    if all(max(rewards) - min(rewards) <= threshold for rewards in group.rewards().values()):
        return "all rewards are the same"
    return None


def all_correct(group: Group, *, threshold: float = 1.0) -> str | None:
    """Drops a group whose rewards, of all policies, are all ``threshold`` or above: too easy."""
    return f"all rewards are at least {threshold:g}" if min(_rewards(group)) >= threshold else None


def all_wrong(group: Group, *, threshold: float = 0.0) -> str | None:
    """Drops a group whose rewards, of all policies, are all ``threshold`` or below: too hard."""
    return f"all rewards are at most {threshold:g}" if max(_rewards(group)) <= threshold else None


def _rewards(group: Group) -> list[float]:
    return [reward for rewards in group.rewards().values() for reward in rewards]


def length(
    sample: Sample, *, min_tokens: Annotated[int, Field(ge=0)] = 0, max_tokens: Annotated[int, Field(ge=0)] | None = None
) -> str | None:
    """Takes out a sample of fewer than ``min_tokens`` or more than ``max_tokens`` sampled tokens; prompt and injected ones do not count."""
    if sample.n_sampled < min_tokens:
        return f"fewer than {min_tokens} sampled tokens"
    if max_tokens is not None and sample.n_sampled > max_tokens:
        return f"more than {max_tokens} sampled tokens"
    return None


def status(sample: Sample, *, drop: tuple[Status, ...] = (Status.TRUNCATED,)) -> str | None:
    """Takes out a sample that ended in one of these ways (``Status``); without options, one that a length or turn limit cut off."""
    return f"it is {sample.status}" if sample.status in drop else None


def repetition(
    sample: Sample, *, ngram: Annotated[int, Field(gt=0)] = 8, threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5
) -> str | None:
    """Takes out a sample that says the same again and again: ``1 − distinct / all`` of its n-grams is above ``threshold``.

    The n-grams are those of sampled tokens without anything injected in between (seq-rep-n of Welleck et al. 2019, arXiv:1908.04319,
    on tokens). A sample without one is kept.
    """
    if len(sample) < ngram:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(sample.tokens, ngram)
    sampled = np.lib.stride_tricks.sliding_window_view(sample.versions >= 0, ngram).all(axis=1)
    grams = windows[sampled]
    if not len(grams):
        return None
    share = 1 - len(np.unique(grams, axis=0)) / len(grams)
    return f"{share:.0%} of its {ngram}-grams are repeated" if share > threshold else None
