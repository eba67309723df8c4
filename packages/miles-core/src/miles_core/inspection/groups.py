"""The group view: the trajectories of one prompt, together. A trajectory's reward counts once, however many samples it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .facts import Facts


class GroupFacts(NamedTuple):
    """One group of one policy at one step.

    Attributes:
        first: Address of its first sample.
        step, source, policy, group, prompt_id, prompt: As of its trajectories.
        size: Trajectories.
        mean, least, most, std: Of their rewards (``std`` over all of them, ddof 0); None where there are none.
        length: Mean number of tokens of a sample.
        statuses: How many samples ended how.
    """

    first: str
    step: int
    source: str
    policy: str
    group: str
    prompt_id: str
    prompt: str
    size: int
    mean: float | None
    least: float | None
    most: float | None
    std: float | None
    length: float
    statuses: dict[str, int]


def grouped(facts: Iterable[Facts]) -> list[GroupFacts]:
    """Groups in the order in which they first appear."""
    members: dict[tuple[int, str, str, str], list[Facts]] = {}
    for f in facts:
        members.setdefault(group_of(f), []).append(f)
    return [_group(of_group) for of_group in members.values()]


def group_of(facts: Facts) -> tuple[int, str, str, str]:
    """What the members of a group have in common, and no others: step, source, policy and the group's id."""
    return facts.step, facts.source, facts.policy, facts.group


def _group(members: list[Facts]) -> GroupFacts:
    first = members[0]
    rewards = np.array(list({f.trajectory: f.reward for f in members if f.reward is not None}.values()))
    mean, least, most, std = (float(f(rewards)) if len(rewards) else None for f in (np.mean, np.min, np.max, np.std))
    return GroupFacts(
        first=first.address,
        step=first.step,
        source=first.source,
        policy=first.policy,
        group=first.group,
        prompt_id=first.prompt_id,
        prompt=first.prompt,
        size=len({f.trajectory for f in members}),
        mean=mean,
        least=least,
        most=most,
        std=std,
        length=float(np.mean([f.length for f in members])),
        statuses=dict(Counter(f.status for f in members)),
    )
