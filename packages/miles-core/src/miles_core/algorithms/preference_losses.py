"""Losses on pairs of answers (DPO, IPO, Bradley–Terry), and the critic's.

A pair is a group of two trajectories. ``advantages`` say which was preferred: positive on the chosen one's rows, negative on the
rejected one's (advantage ``preference``), 0 on both where there is no preference. Everything is in the micro-batch, since a unit is not
split. The pair's loss stands on every trained row of both its answers, so that aggregation ``sequence_mean`` gives the mean over pairs.

A pair without preference, or one of whose answers trains no token (a filter took it out), has loss and gradient 0. It stays in
the denominators, as groups with equal rewards do in policy-gradient losses: it was looked at and says nothing. What should not count must
leave before, e.g. by the group filter ``zero_variance``.

Metrics are means over sequences, like the loss, whatever the lengths: ``margin``, by which the chosen answer is ahead, and
``accuracy``, the share of pairs in which it is; a tie counts one half, so that where policy and reference are equal it is chance.
Pairs that say nothing count as ties.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..protocols import LossInputs, LossOutputs


def dpo(inputs: LossInputs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutputs:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

    With h the sum over an answer's trained tokens of ``log π − log π_ref``, and ``margin = h_chosen − h_rejected`` in nats:
    ``loss = −log σ(beta·margin)``. ``label_smoothing`` ε is the probability that the label is wrong ("conservative DPO", Mitchell
    2023): ``−(1 − ε)·log σ(beta·margin) − ε·log σ(−beta·margin)``. Rows: [N].
    """
    margin, valid = _margin(inputs, _log_ratio_to_reference(inputs))
    loss = -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)
    return _on_rows(inputs, loss, margin, valid)


def ipo(inputs: LossInputs, *, tau: float = 0.1) -> LossOutputs:
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036): the margin is regressed on a constant.

    ``loss = (margin − 1/(2·tau))²`` with h the MEAN over an answer's trained tokens of ``log π − log π_ref``, so that tau means the
    same for answers of any length. The paper writes the sum (eq. 17); its authors told TRL's that they took the mean. Rows: [N].
    """
    tokens = inputs.ops.trajectory_tokens.clamp(min=1)
    margin, valid = _margin(inputs, _log_ratio_to_reference(inputs) / tokens)
    return _on_rows(inputs, (margin - 1 / (2 * tau)).square(), margin, valid)


def bradley_terry(inputs: LossInputs) -> LossOutputs:
    """Reward model (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155): ``loss = −log σ(score_chosen − score_rejected)``.

    A sample's score is what the scalar head says at its last row, where it has read all of it. Rows: [N].
    """
    margin, valid = _margin(inputs, inputs.ops.last(inputs.values))
    return _on_rows(inputs, -F.logsigmoid(margin), margin, valid)


def value_clip(inputs: LossInputs, *, clip: float | None = 0.2) -> LossOutputs:
    """Regression of the critic on the returns, clipped around its values before the step (PPO's, Schulman et al. 2017).

    ``loss = ½·max((v − R)², (v_old + clip(v − v_old, −clip, clip) − R)²)``; without ``clip`` just ``½·(v − R)²``. Rows: [N]; those
    outside the mask may hold NaN. Metric: ``clip_fraction``, the share of trained rows on which the clipped one is the larger.
    """
    values = torch.where(inputs.ops.mask, inputs.values, 0.0)
    returns = inputs.columns["returns"].to(values.dtype)
    loss = (values - returns).square() / 2
    if clip is None:
        return LossOutputs(loss)
    before = inputs.columns["values"].to(values.dtype)
    clipped = (before + (values - before).clamp(-clip, clip) - returns).square() / 2
    return LossOutputs(torch.maximum(loss, clipped), {"clip_fraction": (clipped > loss).to(values.dtype)})


def _log_ratio_to_reference(inputs: LossInputs) -> Tensor:
    """[S]: the sum over each sample's trained tokens of ``log π − log π_ref``."""
    return inputs.ops.sum(inputs.logprobs - inputs.columns["ref_logprobs"].to(inputs.logprobs.dtype))


def _margin(inputs: LossInputs, score: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the chosen answer of each sample's pair scores higher, and whether there are both answers and a preference: [S] each."""
    ops = inputs.ops
    sign = ops.mean(inputs.columns["advantages"].to(score.dtype)).sign()
    chosen, rejected = (ops.over_group((sign == side).to(score.dtype)) > 0 for side in (1, -1))
    return ops.over_group(sign * torch.where(sign == 0, 0.0, score)), chosen & rejected


def _on_rows(inputs: LossInputs, loss: Tensor, margin: Tensor, valid: Tensor) -> LossOutputs:
    """[S] → rows. Metrics are scaled so that their mean over the step's trained tokens is a mean over its trained sequences."""
    ops = inputs.ops
    ahead = torch.where(valid, margin.detach(), 0.0)
    scale = ops.tokens / (max(ops.sequences, 1) * ops.sequence_tokens.clamp(min=1).to(loss.dtype))
    metrics = {"accuracy": scale * (ahead.sign() + 1) / 2, "margin": scale * ahead}
    return LossOutputs(ops.spread(torch.where(valid, loss, 0.0)), {name: ops.spread(x) for name, x in metrics.items()})
