"""Advantages: pure functions of a whole batch, computed in one place, never sharded."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..protocols import AdvantageInputs
from .segments import SegmentOps


def grpo(inputs: AdvantageInputs, *, scale: Literal["std", "none"] = "std") -> Tensor:
    """Group-relative advantage (Shao et al. 2024, arXiv:2402.03300): ``A = (r − mean) / (std + 1e-6)``.

    Mean and sample standard deviation (n − 1) run over the group's trajectories, each counted once however many samples
    it has. ``scale="none"`` leaves out the division (Dr.GRPO, Liu et al. 2025, arXiv:2503.20783). A group of one trajectory
    has advantage 0.

    Returns:
        [N], the trajectory's advantage on every row.
    """
    ops = inputs.ops
    reward, group = trajectory_rewards(inputs.rewards, ops)
    n_groups = int(ops.group.max()) + 1
    count = torch.zeros(n_groups, dtype=reward.dtype).index_add(0, group, torch.ones_like(reward))
    mean = torch.zeros_like(count).index_add(0, group, reward) / count
    centred = reward - mean[group]
    if scale == "std":
        variance = torch.zeros_like(count).index_add(0, group, centred**2) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[group] + 1e-6)
    return ops.spread(centred[ops.trajectory])


def trajectory_rewards(rewards: Tensor, ops: SegmentOps) -> tuple[Tensor, Tensor]:
    """Rewards [S] → (reward, group) of each trajectory [n_trajectories]; samples of one trajectory carry the same reward."""
    reward = rewards.new_zeros(ops.n_trajectories)
    group = torch.zeros(ops.n_trajectories, dtype=torch.int64)
    reward[ops.trajectory] = rewards
    group[ops.trajectory] = ops.group
    return reward, group
