"""How far the trainer's log-probabilities are from those the rollout engine recorded for the same tokens."""

from __future__ import annotations

import numpy as np

from miles_core.batch import Batch


def mismatch_metrics(trainer: np.ndarray, rollout: np.ndarray, versions: np.ndarray, version: int) -> dict[str, float]:
    """Engine mismatch on fresh tokens, policy drift on older ones.

    With d = trainer − rollout over the tokens that ``version`` itself sampled:

    * ``mismatch/tokens``: how many they are;
    * ``mismatch/mean_abs``, ``mismatch/max_abs``: of |d|;
    * ``mismatch/k3``: mean of exp(d) − 1 − d, an unbiased, never negative estimate of KL(rollout ‖ trainer)
      (Schulman 2020, "Approximating KL divergence");
    * ``mismatch/ess``: (Σw)² / (n Σw²) with w = exp(d), the effective part of the sample size (Kish 1965), 1 at best.

    Tokens sampled a versions ago give ``drift/age_<a>/mean_abs``. Tokens nobody sampled (version −1) are left out.

    Args:
        trainer, rollout: float [n], log-probabilities of the same tokens.
        versions: int [n], version that sampled each.
        version: Version of the weights that ``trainer`` comes from.
    """
    difference = trainer.astype(np.float64) - rollout
    age = version - versions
    metrics: dict[str, float] = {}
    for a in np.unique(age[versions >= 0]).tolist():
        d = difference[(age == a) & (versions >= 0)]
        mean_abs = float(np.abs(d).mean())
        if a:
            metrics[f"drift/age_{a}/mean_abs"] = mean_abs
            continue
        metrics["mismatch/tokens"] = float(len(d))
        metrics["mismatch/mean_abs"] = mean_abs
        metrics["mismatch/max_abs"] = float(np.abs(d).max())
        with np.errstate(over="ignore", invalid="ignore"):  # a broken engine is reported as inf or NaN
            metrics["mismatch/k3"] = float((np.expm1(d) - d).mean())
            w = np.exp(d - d.max())  # a common factor, which the sample size does not see and which keeps it from overflowing
            metrics["mismatch/ess"] = float(w.sum() ** 2 / (len(w) * (w**2).sum()))
    return metrics


def mismatch_of(batch: Batch, logprobs: np.ndarray, version: int) -> dict[str, float]:
    """``mismatch_metrics`` of the trained tokens of a batch.

    A token of ``version`` in a sample that older weights began is left out of it and reported as ``mismatch_mixed/mean_abs``: after the
    change of weights the engine ran the context again, under weights (and with experts) of which the recorded columns know nothing.

    Args:
        batch: With the rollout's ``logprobs``.
        logprobs: float [N], the trainer's, of the trained rows.
        version: Version of the weights that they come from.
    """
    trained, versions, rollout = (batch.array(name) for name in ("loss_mask", "versions", "logprobs"))
    mixed = trained & (versions == version) & (versions >= 0)
    mixed[fresh_rows(batch, version)] = False
    compared = trained & ~mixed
    metrics = mismatch_metrics(logprobs[compared], rollout[compared], versions[compared], version)
    if mixed.any():
        metrics["mismatch_mixed/mean_abs"] = float(np.abs(logprobs[mixed].astype(np.float64) - rollout[mixed]).mean())
    return metrics


def fresh_rows(batch: Batch, version: int) -> np.ndarray:
    """int64: the trained rows that ``version`` sampled, in samples that no older weights began: those that the gates look at."""
    trained, versions = batch.array("loss_mask"), batch.array("versions")
    oldest = np.full(len(batch), np.iinfo(versions.dtype).max)
    sampled = versions >= 0
    np.minimum.at(oldest, batch.segment[sampled], versions[sampled])
    return np.flatnonzero(trained & sampled & (versions == version) & (oldest[batch.segment] >= version))
