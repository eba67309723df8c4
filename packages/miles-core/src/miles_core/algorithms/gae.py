"""Advantages by token: discounted sums of what comes after, in linear time on packed rows, without a loop over tokens.

A step is a trained row. Other rows (prompt, tool results, other agents) are no steps: they are skipped and nothing decays over
them. Each sample of a trajectory is followed by the end: a sample's last step earns the trajectory's reward, since branches are
alternative continuations that are trained for one and the same outcome. ``token_rewards`` come on top, step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocols import AdvantageInputs
from .groups import Groups
from .segments import SegmentOps

CHUNK = 32
"""Steps that are summed by one matrix product."""
BLOCK = 1 << 17
"""Rows that are worked on at a time: few enough for caches, and for memory to be used again instead of asked for."""


def gae(inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 1.0, whiten: bool = True) -> dict[str, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438).

    ``δ_t = r_t + γ·V_{t+1} − V_t``, ``A_t = δ_t + γ·λ·A_{t+1}``, where t counts the steps (trained rows) of a sample and V and A are
    0 after its last. ``returns`` are A + V, before whitening: what a critic learns. ``whiten`` then makes the advantages of all
    trained rows of the batch mean 0, variance 1, as most PPO code for language models does.

    Returns:
        ``advantages`` and ``returns``, float64 [N]; 0 outside the mask, whatever ``values`` hold there.
    """
    ops = inputs.ops
    advantages, returns = torch.zeros((2, len(ops.mask)), dtype=torch.float64)
    for steps in Steps.blocks(ops):
        values = steps.take(inputs.columns["values"])
        following = values.roll(-1)
        following[steps.last] = 0.0
        errors = step_rewards(inputs, inputs.rewards, steps).add_(following, alpha=gamma).sub_(values)
        found = discounted_sums(errors, steps.lengths, gamma * lam)
        steps.put(found, advantages)
        steps.put(found + values, returns)
    return {"advantages": whitened(advantages, inputs) if whiten else advantages, "returns": returns}


def reinforce_pp(inputs: AdvantageInputs, *, gamma: float = 1.0) -> Tensor:
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): whitened returns, no critic and no groups.

    ``G_t = Σ_{k ≥ t} γ^{k−t}·r_k`` over the steps (trained rows) of a sample: its reward at the last, and a KL penalty at each if
    one is configured; then ``A = (G − mean) / std`` over all trained rows of the batch, as ``whitened`` says.

    Returns:
        float64 [N]; 0 outside the mask, and everywhere when all returns are equal.
    """
    return _whitened_returns(inputs, inputs.rewards, gamma)


def reinforce_pp_baseline(inputs: AdvantageInputs, *, gamma: float = 1.0) -> Tensor:
    """REINFORCE++ with a group baseline (arXiv:2501.03262): the reward less its group's mean, then as ``reinforce_pp``.

    The mean runs over the group's trajectories, each counted once, and over their rewards without ``token_rewards``. A group of one
    or of equals has reward 0 before the whitening, which runs over all trained rows of the batch.

    Returns:
        float64 [N]; 0 outside the mask.
    """
    groups = Groups.of(inputs.ops)
    centred = groups.centred(groups.per_trajectory(inputs.rewards))
    return _whitened_returns(inputs, centred[inputs.ops.trajectory], gamma)


def _whitened_returns(inputs: AdvantageInputs, rewards: Tensor, gamma: float) -> Tensor:
    returns = torch.zeros(len(inputs.ops.mask), dtype=torch.float64)
    for steps in Steps.blocks(inputs.ops):
        steps.put(discounted_sums(step_rewards(inputs, rewards, steps), steps.lengths, gamma), returns)
    return whitened(returns, inputs)


@dataclass(frozen=True)
class Steps:
    """The trained rows of some of a batch's samples, one sample after another.

    Attributes:
        rows: int64 [M], the batch's row of each step.
        samples: int64, those of the samples that have any step.
        lengths: int64, their steps.
        last: int64, index (0 to M − 1) of the last step of each.
    """

    rows: Tensor
    samples: Tensor
    lengths: Tensor
    last: Tensor

    @staticmethod
    def blocks(ops: SegmentOps) -> Iterator[Steps]:
        """All steps of a whole batch, whose rows stand together by sample: at a time samples of up to ``BLOCK`` rows, or a single one."""
        n_samples = len(ops.sequence_tokens)
        ends = torch.searchsorted(ops.segment, torch.arange(n_samples), right=True)
        sample, row = 0, 0
        while sample < n_samples:
            next_sample = max(sample + 1, int(torch.searchsorted(ends, row + BLOCK, right=True)))
            next_row = int(ends[next_sample - 1])
            samples = sample + ops.sequence_tokens[sample:next_sample].nonzero().squeeze(1)
            lengths = ops.sequence_tokens[samples]
            yield Steps(row + ops.mask[row:next_row].nonzero().squeeze(1), samples, lengths, lengths.cumsum(0) - 1)
            sample, row = next_sample, next_row

    def take(self, column: Tensor) -> Tensor:
        """[N] → float64 [M]."""
        return column.index_select(0, self.rows).double()

    def put(self, x: Tensor, column: Tensor) -> None:
        """[M] onto its rows of [N]."""
        column.scatter_(0, self.rows, x)


def step_rewards(inputs: AdvantageInputs, rewards: Tensor, steps: Steps) -> Tensor:
    """float64 [M]: ``rewards`` [S] at each sample's last step, and ``token_rewards`` at every step, if there are any."""
    out = torch.zeros(len(steps.rows), dtype=torch.float64) if inputs.token_rewards is None else steps.take(inputs.token_rewards)
    out[steps.last] += rewards[steps.samples].double()
    return out


def discounted_sums(x: Tensor, lengths: Tensor, factor: float) -> Tensor:
    """``y_t = x_t + factor·y_{t+1}`` within each sequence.

    Sequences are cut into chunks of ``CHUNK``, the last one filled up with zeros. One product with the triangular matrix
    ``factor^(k−t)`` sums within all chunks; then every chunk lacks ``factor^(distance to its end)`` times the y right after it. The y at
    the beginnings of chunks are such sums themselves, of sequences ``CHUNK`` times shorter with ``factor^CHUNK``: recursion.
    No power is negative, so a factor of 0 or 1 is exact and a small one does not overflow.

    Args:
        x: float64 [M], the sequences end to end.
        lengths: int64, of each sequence, at least 1; together M.
        factor: 0 to 1.
    """
    if not len(x):
        return x
    chunks = (lengths + CHUNK - 1) // CHUNK
    ends = chunks.cumsum(0)
    fill = (ends - chunks) * CHUNK - (lengths.cumsum(0) - lengths)  # zeros before each sequence
    places = torch.arange(len(x)).add_(fill.repeat_interleave(lengths, output_size=len(x)))
    powers = factor ** torch.arange(CHUNK + 1, dtype=x.dtype)
    distance = torch.arange(CHUNK)[:, None] - torch.arange(CHUNK)
    triangle = torch.where(distance >= 0, powers[distance.clamp(min=0)], 0.0)
    y = x.new_zeros(int(ends[-1]) * CHUNK).scatter_(0, places, x).view(-1, CHUNK) @ triangle
    if len(y) > len(lengths):  # some sequence has more than one chunk
        after = discounted_sums(y[:, 0], chunks, factor**CHUNK).roll(-1)
        after[ends - 1] = 0.0
        y.addcmul_(after[:, None], powers[1:].flip(0))
    return y.view(-1).index_select(0, places)


def whitened(x: Tensor, inputs: AdvantageInputs) -> Tensor:
    """``(x − mean) / sqrt(var + 1e-8)`` with the moments of all trained rows of the batch, n − 1 in the variance; 0 outside the mask.

    A row that branches share counts once, with the mean over the branches.
    """
    x, once = inputs.over_branches(x), inputs.once
    centred = torch.where(inputs.ops.mask, x - once.mean(x, "global"), 0.0)
    return centred / (once.sum(centred**2, "global") / max(once.tokens - 1, 1) + 1e-8).sqrt()
