"""Statistics of groups over trajectories: each counts once, however many samples it has. Used by the group-relative advantages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocols import AdvantageInputs
from .segments import SegmentOps


@dataclass(frozen=True)
class Groups:
    """The groups of a whole batch. What is taken and given is float64 [T], one number for each of its T trajectories.

    Attributes:
        ops: The batch's reductions.
        index: int64 [T], the group of each trajectory.
        size: float64 [T], trajectories in the group of each trajectory.
    """

    ops: SegmentOps
    index: Tensor
    size: Tensor

    @staticmethod
    def of(ops: SegmentOps) -> Groups:
        """The groups that these reductions know of."""
        index = torch.zeros(ops.n_trajectories, dtype=torch.int64)
        index[ops.trajectory] = ops.group
        return Groups(ops, index, torch.bincount(index)[index].double())

    def per_trajectory(self, x: Tensor) -> Tensor:
        """[S] → [T]: what all samples of a trajectory carry alike, once."""
        out = torch.zeros(self.ops.n_trajectories, dtype=torch.float64)
        out[self.ops.trajectory] = x.double()
        return out

    def rewards(self, inputs: AdvantageInputs) -> Tensor:
        """[T], each trajectory's reward and the sum of its rows' ``token_rewards``, if there are any; rows that branches share once."""
        reward = self.per_trajectory(inputs.rewards)
        return reward if inputs.token_rewards is None else reward + inputs.once.sum(inputs.token_rewards.double(), "trajectory")

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the group of each trajectory."""
        return torch.zeros_like(x).index_add(0, self.index, x)[self.index]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the group of each trajectory."""
        return self.sum(x) / self.size

    def max(self, x: Tensor) -> Tensor:
        """The largest of the group of each trajectory."""
        return torch.zeros_like(x).scatter_reduce(0, self.index, x, "amax", include_self=False)[self.index]

    def differ(self, x: Tensor) -> Tensor:
        """bool [T], whether the group of each trajectory has two different values. A group of one has not."""
        return self.max(x) != -self.max(-x)

    def centred(self, x: Tensor) -> Tensor:
        """``x`` − mean; exactly 0 in groups of equals and of one."""
        return torch.where(self.differ(x), x - self.mean(x), 0.0)

    def scaled(self, x: Tensor) -> Tensor:
        """``(x − mean) / (std + 1e-6)`` with the sample standard deviation (n − 1); 0 in groups of equals and of one."""
        centred = self.centred(x)
        return centred / ((self.sum(centred**2) / (self.size - 1).clamp(min=1)).sqrt() + 1e-6)

    def rows(self, x: Tensor) -> Tensor:
        """[T] → [N], the trajectory's number on every row."""
        return self.ops.spread(x[self.ops.trajectory])
