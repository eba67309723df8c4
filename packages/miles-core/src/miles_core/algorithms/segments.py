"""SegmentOps: the only way in which algorithms reduce. The same function is right packed, split and sharded (DESIGN §2).

Two kinds of result, never mixed up:

* ``sum`` / ``mean`` *per sequence*, *per trajectory* or *global* are complete: under context and data parallelism the ranks
  add up their parts. Differentiable: the loss is the sum of all ranks' ``share``, so the gradient of a sum over ranks is summed
  over the ranks too, and parameter gradients are summed, not averaged. Every rank must call them, and run backward, alike.
  They are complete over ranks, not over micro-batches: a loss may use what its micro-batch holds whole (its sequences, and
  trajectories where the unit keeps them together); *global* ones belong to whole batches.
* ``share`` is this part's exact share of a weighted sum over the whole optimizer step: shares of all micro-batches and ranks
  add up to the loss. The weights come from the step's denominators alone, so no communication is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..batch import Batch

Per = Literal["sequence", "trajectory", "global"]


class _SumOverRanks(torch.autograd.Function):
    """All-reduce, forward and backward: the loss is the sum of the ranks' shares, and each of them may use every rank's part."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return x if group is None else _SumOverRanks.apply(x, group)


@dataclass(frozen=True)
class SegmentOps:
    """Reductions over the rows [N] of a packed batch of S samples.

    Attributes:
        segment: int64 [N], the sample of each row.
        mask: bool [N], trained rows; every reduction counts these only.
        trajectory: int64 [S], index over the whole step.
        sequence_tokens: [S], trained rows of each sample (over all context-parallel ranks).
        trajectory_tokens: [S], trained rows of each sample's trajectory (over all its samples).
        tokens, sequences, trajectories: The step's denominators: trained rows, and non-empty sequences and trajectories.
        n_trajectories: Length of a per-trajectory result (every trajectory of the step, empty ones too).
        ends: bool [N], the last row of each sample: it has read the whole sample and predicts nothing.
        cp: Ranks that hold other rows of the same samples.
        dp: Ranks that hold other samples.
    """

    segment: Tensor
    mask: Tensor
    trajectory: Tensor
    group: Tensor
    sequence_tokens: Tensor
    trajectory_tokens: Tensor
    tokens: int
    sequences: int
    trajectories: int
    n_trajectories: int
    ends: Tensor
    cp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None

    @staticmethod
    def of(
        batch: Batch,
        device: torch.device | str = "cpu",
        *,
        n_trajectories: int | None = None,
        cp: dist.ProcessGroup | None = None,
        dp: dist.ProcessGroup | None = None,
    ) -> SegmentOps:
        """The reductions of a batch, or of a shard or micro-batch of one.

        Args:
            batch: Its ``loss_mask`` says which rows count.
            device: Where the columns are.
            n_trajectories: Trajectories of the whole step; needed when ``dp`` is given, since ranks must agree on it.
            cp: Process group of the ranks that hold other rows of the same samples.
            dp: Process group of the ranks that hold other samples.
        """
        s = batch.segments

        def tensor(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        if dp is not None and n_trajectories is None:
            raise ValueError("SegmentOps.of: with dp, n_trajectories (of the whole optimizer step) must be given, so that all ranks agree")
        return SegmentOps(
            segment=tensor(batch.segment),
            mask=tensor(batch.array("loss_mask")),
            trajectory=tensor(s.trajectory),
            group=tensor(s.group),
            sequence_tokens=tensor(s.sequence_tokens),
            trajectory_tokens=tensor(s.trajectory_tokens),
            tokens=s.tokens,
            sequences=s.sequences,
            trajectories=s.trajectories,
            n_trajectories=n_trajectories or int(s.trajectory.max(initial=-1)) + 1,
            ends=tensor(batch.ends),
            cp=cp,
            dp=dp,
        )

    def sum(self, x: Tensor, per: Per = "sequence") -> Tensor:
        """Sum of trained rows.

        Args:
            x: [N].
            per: ``sequence`` → [S]; ``trajectory`` → [n_trajectories]; ``global`` → scalar.
        """
        x = self._trained(x)
        if per == "global":
            return _sum_over(_sum_over(x.sum(), self.cp), self.dp)
        if per == "sequence":
            return _sum_over(x.new_zeros(len(self.trajectory)).index_add(0, self.segment, x), self.cp)
        total = x.new_zeros(self.n_trajectories).index_add(0, self.trajectory[self.segment], x)
        return _sum_over(_sum_over(total, self.cp), self.dp)

    def mean(self, x: Tensor, per: Per = "sequence") -> Tensor:
        """Mean over trained rows, shaped as in ``sum``; 0 where there are none."""
        if per == "global":
            return self.sum(x, per) / max(self.tokens, 1)
        if per == "sequence":
            return self.sum(x, per) / self.sequence_tokens.clamp(min=1)
        count = self.sum(torch.ones_like(x), per)
        return self.sum(x, per) / count.clamp(min=1)

    def last(self, x: Tensor) -> Tensor:
        """``x`` [N] on the last row of each sample → [S]. That row is outside the mask: it predicts nothing."""
        x = torch.where(self.ends, x, torch.zeros((), dtype=x.dtype, device=x.device))
        return _sum_over(x.new_zeros(len(self.trajectory)).index_add(0, self.segment, x), self.cp)

    def over_group(self, x: Tensor) -> Tensor:
        """``x`` [S] → [S], the sum over the samples of the same group; for losses whose unit (pair, group) keeps groups whole."""
        return x.new_zeros(int(self.group.max()) + 1).index_add(0, self.group, x)[self.group]

    def spread(self, x: Tensor) -> Tensor:
        """Per-sample values [S] → rows [N]."""
        return x[self.segment]

    def share(self, x: Tensor, weights: Tensor) -> Tensor:
        """Scalar: this part's share of Σ weights · x over the trained rows of the whole optimizer step.

        Args:
            x: [N], e.g. the loss of each row.
            weights: [N], an aggregation's weights (they sum to 1 over the step for a mean); taken in the dtype of ``x``.
        """
        return (self._trained(x) * self._trained(weights.to(x.dtype))).sum()

    def _trained(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))  # not x * mask: NaN × 0 is NaN
