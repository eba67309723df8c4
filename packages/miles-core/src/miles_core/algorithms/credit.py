"""From rewards to what each trained row is worth: advantages and corrections of a whole batch, as columns. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..errors import DataError, PluginError
from ..prefixes import train_once
from ..protocols import Advantage, AdvantageInputs, Correction, CorrectionInputs, CorrectionOutputs, Kl
from .segments import SegmentOps


def advantage_columns(
    batch: Batch, advantage: Advantage, weights: Mapping[str, float], kl_reward: tuple[Kl, float] | None, metrics: dict[str, float]
) -> dict[str, np.ndarray]:
    """What the advantage gives: float32 [N] by name.

    Args:
        batch: Annotated.
        advantage: The built plug-in.
        weights: Weight of each part in the reward.
        kl_reward: Estimator and coefficient of a KL penalty in the reward.
        metrics: Gets ``kl_reward/mean``, the penalised divergence a trained token.

    Raises:
        PluginError: The advantage gives something else than one number a row.
        DataError: One of a trained row is not finite in float32; names the sample.
    """
    ops, columns = SegmentOps.of(batch), batch.tensors()
    owners = None if batch.owners is None else torch.from_numpy(batch.owners)
    counted = None if batch.owners is None else SegmentOps.of(train_once(batch, batch.owners))
    token_rewards = None
    if kl_reward is not None:
        estimator, coefficient = kl_reward
        divergence = torch.where(ops.mask, estimator(columns["old_logprobs"].double(), columns["ref_logprobs"].double()), 0.0)
        token_rewards = -coefficient * divergence
        metrics["kl_reward/mean"] = float((counted or ops).mean(divergence, "global"))
    inputs = AdvantageInputs(
        rewards=torch.from_numpy(batch.rewards),
        columns=columns,
        ops=ops,
        parts=_reward_parts(batch),
        weights=weights,
        token_rewards=token_rewards,
        owners=owners,
        counted=counted,
    )
    given = advantage(inputs)
    named = given if isinstance(given, dict) else {"advantages": given}
    for name, column in named.items():
        if column.shape != ops.mask.shape:
            raise PluginError(f"the advantage gave {name!r} of shape {list(column.shape)}; expected one a row, {list(ops.mask.shape)}")
        _refuse_non_finite(batch, ops.mask, column.to(torch.float32), f"the advantage's {name!r}")
    return {name: column.to(torch.float32).numpy() for name, column in named.items()}


def corrected(batch: Batch, corrections: Mapping[str, Correction], metrics: dict[str, float]) -> Batch:
    """The batch with ``correction_weights`` (their product), and without the rows that a correction drops.

    Each correction sees the rows that those before it kept. Metrics: what they report as ``correction/<name>/<metric>``, and
    ``correction/<name>/dropped``, the share of trained rows that left.

    Raises:
        DataError: A trained token lacks a log-probability, or has a weight that is not finite in float32; names the sample.
        PluginError: A correction gives something else than one weight, or one bool, a row.
    """
    columns = batch.tensors()
    weights = torch.ones(batch.n_rows, dtype=torch.float64)
    for name, correction in corrections.items():
        ops = SegmentOps.of(batch)
        for column in ("old_logprobs", "logprobs"):
            if (missing := ops.mask & columns[column].isnan()).any():
                raise DataError(f"correction {name!r}: a trained token of sample {_sample(batch, missing)} has no {column}")
        out = correction(
            CorrectionInputs(columns["old_logprobs"].double(), columns["logprobs"].double(), columns["advantages"].double(), ops)
        )
        _refuse_odd_rows(out, ops, name)
        metrics |= {f"correction/{name}/{key}": value for key, value in out.metrics.items()}
        if out.weights is not None:
            weights = weights * torch.where(ops.mask, out.weights, 1.0)
            _refuse_non_finite(batch, ops.mask, weights.to(torch.float32), f"after correction {name!r} a weight")
        if out.keep is not None:
            mask = ops.mask & out.keep
            metrics[f"correction/{name}/dropped"] = 1.0 - float(mask.sum()) / max(int(ops.mask.sum()), 1)
            batch = batch.with_columns({"loss_mask": mask.numpy()}).counted()
    return batch.with_columns({"correction_weights": weights.to(torch.float32).numpy()})


def _reward_parts(batch: Batch) -> dict[str, Tensor]:
    """The reward's parts that every sample has; float64 [S] each."""
    names = [n for n in batch.refs[0].rewards if all(n in r.rewards for r in batch.refs)]
    return {n: torch.tensor([r.rewards[n] for r in batch.refs], dtype=torch.float64) for n in names}


def _refuse_non_finite(batch: Batch, mask: Tensor, column: Tensor, what: str) -> None:
    if (bad := mask & ~column.isfinite()).any():
        raise DataError(f"{what} is {float(column[bad][0])} for sample {_sample(batch, bad)}; every trained token needs a finite one")


def _refuse_odd_rows(out: CorrectionOutputs, ops: SegmentOps, name: str) -> None:
    for what, rows in (("weights", out.weights), ("keep", out.keep)):
        if rows is not None and (rows.shape != ops.mask.shape or (what == "keep" and rows.dtype != torch.bool)):
            expected = f"one {'bool' if what == 'keep' else 'number'} a row, {list(ops.mask.shape)}"
            raise PluginError(f"correction {name!r} gave {what} as {rows.dtype} of shape {list(rows.shape)}; expected {expected}")


def _sample(batch: Batch, rows: Tensor) -> str:
    """Id of the sample that the first of these rows belongs to."""
    return str(batch.refs[int(batch.segment[int(rows.nonzero()[0])])].id)
