"""Mismatch and drift by their formulas."""

import numpy as np
import pytest

from miles_core.batch import Batch
from miles_core.refs import SampleRef
from miles_core.sample import Sample, SampleId
from miles_train.mismatch import mismatch_metrics, mismatch_of


def test_fresh_tokens_are_mismatch_and_older_ones_drift():
    trainer = np.array([-1.0, -2.0, -0.5, -3.0, -1.0, -9.0])
    rollout = np.array([-1.1, -1.8, -0.5, -2.0, -1.5, np.nan], np.float32)
    versions = np.array([7, 7, 7, 6, 4, -1])
    metrics = mismatch_metrics(trainer, rollout, versions, 7)
    ratio = np.exp([0.1, -0.2, 0.0])  # p_trainer / p_rollout
    assert metrics.pop("mismatch/tokens") == 3
    assert metrics.pop("mismatch/mean_abs") == pytest.approx(0.1, abs=1e-6)
    assert metrics.pop("mismatch/max_abs") == pytest.approx(0.2, abs=1e-6)
    assert metrics.pop("mismatch/k3") == pytest.approx(np.mean(ratio - 1 - np.log(ratio)), abs=1e-6)
    assert metrics.pop("mismatch/ess") == pytest.approx(1 / 3 * ratio.sum() ** 2 / (ratio**2).sum(), abs=1e-6)
    assert metrics.pop("drift/age_1/mean_abs") == pytest.approx(1.0)
    assert metrics.pop("drift/age_3/mean_abs") == pytest.approx(0.5)
    assert metrics == {}


def test_k3_estimates_the_divergence():
    """Over every token of a small vocabulary, weighted as sampled, k3 is KL(rollout ‖ trainer) itself."""
    rollout, trainer = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    tokens = np.array([0, 0, 1, 2])  # each as often as the rollout samples it
    metrics = mismatch_metrics(np.log(trainer[tokens]), np.log(rollout[tokens]), np.zeros(4, int), 0)
    assert metrics["mismatch/k3"] == pytest.approx((rollout * np.log(rollout / trainer)).sum())


def test_equal_log_probabilities_are_no_mismatch():
    same = -np.random.default_rng(0).random(5)
    metrics = mismatch_metrics(same, same, np.full(5, 2), 2)
    assert metrics == {
        "mismatch/tokens": 5,
        "mismatch/mean_abs": 0,
        "mismatch/max_abs": 0,
        "mismatch/k3": 0,
        "mismatch/ess": pytest.approx(1),
    }


def test_without_sampled_tokens_there_is_nothing_to_say():
    assert mismatch_metrics(np.zeros(3), np.full(3, np.nan), np.full(3, -1), 0) == {}


def sampled_under(trajectory: int, versions: list[int], trained: list[bool]) -> SampleRef:
    """A prompt of one token, and an answer whose token i the engine gave log-probability −i − trajectory / 10."""
    given = np.array([-1, *versions])
    logprobs = np.where(given >= 0, -np.arange(len(given)) - trajectory / 10, np.nan)
    sample_id = SampleId("run", "policy", "p", "g", trajectory)
    mask = np.array([False, *trained])
    return SampleRef.of(Sample.of(sample_id, np.arange(len(given)), versions=given, loss_mask=mask, logprobs=logprobs))


def test_fresh_tokens_of_samples_that_older_weights_began_are_told_apart():
    """Also where the older tokens are not trained. What comes after the change of weights tells nothing of the engine."""
    batch = Batch.of(
        [
            sampled_under(0, [7, 7], [True, True]),
            sampled_under(1, [6, 6, 7, 7], [True, True, True, False]),
            sampled_under(2, [5, 7], [False, True]),
            sampled_under(3, [6], [True]),
        ]
    )
    off = np.array([0.1, 0.2, np.nan, 1.0, 2.0, 4.0, np.nan, np.nan, np.nan, 8.0, np.nan, 3.0, np.nan])  # of the trained rows
    metrics = mismatch_of(batch, (batch.array("logprobs") + off).astype(np.float32), 7)
    ratio = np.exp([0.1, 0.2])
    assert metrics.pop("mismatch/tokens") == 2
    assert metrics.pop("mismatch/mean_abs") == pytest.approx(0.15, abs=1e-6)
    assert metrics.pop("mismatch/max_abs") == pytest.approx(0.2, abs=1e-6)
    assert metrics.pop("mismatch/k3") == pytest.approx(np.mean(ratio - 1 - np.log(ratio)), abs=1e-6)
    assert metrics.pop("mismatch/ess") == pytest.approx(ratio.sum() ** 2 / (2 * (ratio**2).sum()), abs=1e-6)
    assert metrics.pop("mismatch_mixed/mean_abs") == pytest.approx((4 + 8) / 2, abs=1e-6)
    assert metrics.pop("drift/age_1/mean_abs") == pytest.approx((1 + 2 + 3) / 3, abs=1e-6)
    assert metrics == {}


def test_a_batch_of_one_version_has_nothing_mixed():
    batch = Batch.of([sampled_under(0, [7, 7], [True, True]), sampled_under(1, [6], [True])])
    assert "mismatch_mixed/mean_abs" not in mismatch_of(batch, batch.array("logprobs"), 7)
