"""advantage: how rewards become advantages, for the whole batch in one place.

In a recipe:

    models: {policy: {advantage: {use: "ranks_in_group:ranks_in_group"}}}
"""

import torch

import miles_core as miles
from miles_core.algorithms.groups import Groups


@miles.advantage(needs={"rewards", "groups"})
def ranks_in_group(inputs):
    """Where a trajectory stands among those of its prompt: from −1 (all others are better) to 1. Returns [N], one number a row."""
    groups = Groups.of(inputs.ops)
    reward = groups.rewards(inputs)  # [T], one number a trajectory
    same = groups.index[:, None] == groups.index
    beaten = (same * torch.sign(reward[:, None] - reward)).sum(1)
    return groups.rows(beaten / (groups.size - 1).clamp(min=1))
