"""Advantages: pure functions of a whole batch, computed in one place, never sharded. Those by token with rewards are in ``gae``.

Group statistics run over trajectories: each counts once, however many samples it has, and keeps counting when a sample filter took
them out of training. A group of one and a group of equals have advantage 0. ``token_rewards`` (a KL penalty in the reward) enter as
their sum over the trajectory, before the statistics. All of it is float64; advantages [N] stand on every row of a trajectory.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import DataError
from ..protocols import Advantage, AdvantageInputs
from .groups import Groups


def grpo(inputs: AdvantageInputs, *, scale: Literal["std", "none"] = "std") -> Tensor:
    """Group-relative advantage (Shao et al. 2024, arXiv:2402.03300): ``A = (r − mean) / (std + 1e-6)``, n − 1 in the deviation.

    ``scale="none"`` leaves out the division (Dr.GRPO, Liu et al. 2025, arXiv:2503.20783). Returns [N].
    """
    groups = Groups.of(inputs.ops)
    reward = groups.rewards(inputs)
    return groups.rows(groups.scaled(reward) if scale == "std" else groups.centred(reward))


def rloo(inputs: AdvantageInputs) -> Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): ``A = r − mean of the group's other trajectories``. Returns [N]."""
    groups = Groups.of(inputs.ops)
    return groups.rows(groups.centred(groups.rewards(inputs)) * groups.size / (groups.size - 1).clamp(min=1))


def maxrl(inputs: AdvantageInputs) -> Tensor:
    """Maximum-likelihood RL (Tajwar et al. 2026, arXiv:2602.02710): ``A = (r − mean) / mean``, for rewards 0 and 1.

    With them it estimates the gradient of a sum of ``pass@k / k``, which nears that of the log-probability of success. A group without
    any success has advantage 0. Rewards between or above are taken as they are; the paper does not speak of them. Returns [N].

    Raises:
        DataError: A reward is negative, so that a mean may be near 0 or turn every sign.
    """
    groups = Groups.of(inputs.ops)
    reward = groups.rewards(inputs)
    if (reward < 0).any():
        raise DataError(f"advantage maxrl divides by the mean reward, so rewards are 0 or above; found {float(reward.min())}")
    mean = groups.mean(reward)
    return groups.rows(groups.centred(reward) / torch.where(mean > 0, mean, 1.0))


def opo(inputs: AdvantageInputs) -> Tensor:
    """On-policy RL with optimal reward baseline (Hao et al. 2025, arXiv:2505.23585): ``A = r − Σ l·r / Σ l`` over the group.

    ``l`` is the number of a trajectory's trained rows: the baseline of least variance if the squared gradient of a trajectory's
    log-probability grows as its length. Returns [N].
    """
    groups = Groups.of(inputs.ops)
    reward, length = groups.rewards(inputs), groups.per_trajectory(inputs.once.trajectory_tokens)
    baseline = groups.sum(length * reward) / groups.sum(length).clamp(min=1)
    return groups.rows(torch.where(groups.differ(reward), reward - baseline, 0.0))


def pass_at_k(inputs: AdvantageInputs, *, k: int) -> Tensor:
    """Pass@k training with the analytical advantage (Chen et al. 2025, arXiv:2508.10751), for rewards 0 and 1.

    Every set of k of the group's n trajectories earns 1 if one of them is right; a trajectory's advantage is the mean over the sets it
    is in. With ``F = C(wrong, k) / C(n, k)``, the share of sets without a right one, and ``σ = sqrt((1 − F)·F)``::

        right:  A = F / σ                   wrong:  A = (F − C(wrong − 1, k − 1) / C(n − 1, k − 1)) / σ

    0 where σ is 0, and in groups of fewer than k. ``k=1`` is GRPO with the population's deviation. Returns [N].

    Raises:
        DataError: A reward is neither 0 nor 1.
    """
    groups = Groups.of(inputs.ops)
    reward = groups.rewards(inputs)
    if (odd := reward[(reward != 0) & (reward != 1)]).numel():
        raise DataError(f"advantage pass_at_k counts right and wrong answers, so rewards are 0 or 1; found {float(odd[0])}")
    wrong = groups.size - groups.sum(reward)
    fails = _all_within(wrong, groups.size, k)
    deviation = ((1 - fails) * fails).sqrt()
    centred = torch.where(reward > 0, fails, fails - _all_within(wrong - 1, groups.size - 1, k - 1))
    return groups.rows(torch.where(deviation > 0, centred / deviation, 0.0))


def _all_within(part: Tensor, whole: Tensor, k: int) -> Tensor:
    """``C(part, k) / C(whole, k)``: of all sets of k of ``whole`` things the share that lies within ``part`` of them; 0 if part < k."""
    i = torch.arange(k, dtype=part.dtype)
    return ((part[:, None] - i).clamp(min=0) / (whole[:, None] - i).clamp(min=1)).prod(1)


def gdpo(inputs: AdvantageInputs) -> Tensor:
    """Group reward-decoupled normalisation (Liu et al. 2026, arXiv:2601.05242), for rewards of several parts.

    Each part j is normalised for itself in its group as in ``grpo``, ``A_j = (r_j − mean) / (std + 1e-6)``; then ``A = Σ weight_j·A_j`` is
    divided by its sample standard deviation over all trajectories of the batch, + 1e-6 (its mean is 0 in every group already).
    So a part of small range counts for its weight, and different mixtures of parts with the same sum stay different. Returns [N].

    Raises:
        DataError: A part is missing, or the parts do not add up to the reward; or there are ``token_rewards``, which are no part.
    """
    groups = Groups.of(inputs.ops)
    weights = {name: weight for name, weight in inputs.weights.items() if name in inputs.parts or name != "environment"}
    if missing := [name for name in weights if name not in inputs.parts]:
        raise DataError(f"advantage gdpo normalises each part of the reward, but some sample has no {', '.join(map(repr, missing))}")
    if inputs.token_rewards is not None:
        raise DataError(
            "advantage gdpo normalises each part of the reward, and a KL penalty is none of them; put a kl term into the losses"
        )
    reward, total = torch.zeros_like(groups.size), torch.zeros_like(groups.size)
    for name, weight in weights.items():
        part = groups.per_trajectory(inputs.parts[name])
        reward += weight * part
        total += weight * groups.scaled(part)
    if not torch.allclose(reward, groups.rewards(inputs)):
        raise DataError(f"advantage gdpo: the parts {', '.join(weights)} do not add up to the reward; every sample needs all of its parts")
    return groups.rows(total / (((total**2).sum() / max(len(total) - 1, 1)).sqrt() + 1e-6))


def preference(inputs: AdvantageInputs) -> Tensor:
    """+1 on the trajectory of the highest reward of each group, −1 on that of the lowest, 0 elsewhere: pairs for DPO, IPO, Bradley–Terry.

    Only trajectories with a trained row are looked at, since half a pair teaches nothing; of equals the first in the batch is taken.
    Groups without two different rewards have 0. Returns [N].
    """
    groups = Groups.of(inputs.ops)
    reward = groups.rewards(inputs)
    trained = groups.per_trajectory(inputs.ops.trajectory_tokens) > 0
    order = -torch.arange(len(reward), dtype=torch.float64)

    def first_best(x: Tensor) -> Tensor:
        x = torch.where(trained, x, -torch.inf)
        place = torch.where(x == groups.max(x), order, -torch.inf)
        return (place == groups.max(place)).double()

    return groups.rows(first_best(reward) - first_best(-reward))  # of equals the same one is best and worst: 0


def opd(inputs: AdvantageInputs, *, base: Advantage | None = None, coefficient: float = 1.0) -> dict[str, Tensor]:
    """On-policy distillation: ``A = A_base − coefficient·(log π_student − log π_teacher)`` on each trained row.

    The second part is a sample of the reverse KL of each token, with nothing of what follows (discount 0), as in Lu et al. 2025
    (Thinking Machines Lab, "On-Policy Distillation"); Agarwal et al. 2023 (arXiv:2306.13649) have the whole of it. The student is the
    policy that sampled: ``logprobs`` of the rollout against ``teacher_logprobs``. Without ``base`` A_base is the row's own token reward,
    or 0. Whatever else the base gives (``returns``) is passed on.

    Returns:
        Columns [N]; ``advantages`` are 0 outside the mask, and not finite where the teacher excludes a token: the caller refuses that.
    """
    ops = inputs.ops
    if base is None:
        given = {"advantages": torch.zeros(len(ops.mask), dtype=torch.float64) if inputs.token_rewards is None else inputs.token_rewards}
    else:
        result = base(inputs)
        given = dict(result) if isinstance(result, dict) else {"advantages": result}
    gap = inputs.columns["logprobs"].double() - inputs.columns["teacher_logprobs"].double()
    return given | {"advantages": torch.where(ops.mask, given["advantages"].double() - coefficient * gap, 0.0)}
