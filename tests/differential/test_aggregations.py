"""Aggregations against the golden values of the algorithm notes and against sums written out over samples and trajectories."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures.samples import answer, sample_id
from fixtures.strategies import batches
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from miles_core.batch import Batch
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, LossInputs
from miles_core.refs import SampleRef

torch = pytest.importorskip("torch")

NEW = np.array([[-1, -0.5, -2, -0.3], [-0.2, -1.5, -0.7, 0]])
OLD = np.array([[-1.1, -0.9, -1.2, -0.3], [-0.6, -1, -0.9, 0]])
REFERENCE = np.array([[-1.2, -0.6, -1, -0.5], [-0.3, -1.1, -1.7, 0]])
ADVANTAGE = np.array([[1.0], [-0.5]]) * np.ones((2, 4))
NAMES = ["token_mean", "token_sum", "sequence_mean", "sequence_mean_token_sum", "trajectory_mean", "constant"]
OPTIONS = {"constant": {"length": 4}}


def built(point, use, **options):
    """The function a recipe would get."""
    return config_class(point, use).model_validate({"use": use, **options}).build(BuildContext(None, "aggregations", 0))


def aggregation(use):
    return built("aggregation", use, **OPTIONS.get(use, {}))


def ops_of(batch):
    from miles_core.algorithms.segments import SegmentOps

    return SegmentOps.of(batch)


def batch_of(samples):
    return Batch.of([SampleRef.of(s) for s in samples])


def worked_batch(masked=((1, -1),)):
    """Two samples of a prompt token and four sampled ones; the last token of the second is not trained."""
    samples = [answer(sample_id(t), [5], [10, 11, 12, 13], reward=0.0) for t in range(2)]
    for sample, token in masked:
        samples[sample].loss_mask[token] = False
    return batch_of(samples)


def packed(values):
    """[2, 4] → the batch's ten rows; the last row of a sample predicts nothing."""
    return torch.from_numpy(np.concatenate([np.append(row, np.nan) for row in values]))


def rows_of(batch, loss, **columns):
    """Loss of each row of the worked input."""
    given = {"old_logprobs": packed(OLD), "ref_logprobs": packed(REFERENCE), "advantages": packed(ADVANTAGE), **columns}
    return loss(LossInputs({"logprobs": packed(NEW)}, given, ops_of(batch))).loss


@pytest.mark.parametrize(
    ("use", "golden"),
    [
        ("token_mean", -0.296841),
        ("token_sum", -2.077886),
        ("sequence_mean_token_sum", -1.038943),
        ("sequence_mean", -0.186544),
        ("constant", -0.259736),
        ("trajectory_mean", -0.186544),  # one sample each: the mean over sequences
    ],
)
def test_ppo_has_the_golden_value_under_each(use, golden):
    batch = worked_batch()
    rows = rows_of(batch, built("loss", "ppo_clip", clip_low=0.2, clip_high=0.28))
    ops = ops_of(batch)
    assert ops.share(rows, aggregation(use)(ops)).item() == pytest.approx(golden, abs=6e-7)


def test_terms_add_up_to_the_golden_value_with_a_kl_term():
    """seq-mean-token-mean of PPO + 0.1 · KL (k3)."""
    batch = worked_batch()
    rows = rows_of(batch, built("loss", "ppo_clip", clip_low=0.2, clip_high=0.28))
    divergence = built("kl", "k3")(packed(NEW), packed(REFERENCE))
    ops = ops_of(batch)
    assert ops.share(rows + 0.1 * divergence, aggregation("sequence_mean")(ops)).item() == pytest.approx(-0.169294, abs=6e-7)


# ---- the formulas, by loops ------------------------------------------------------------------------------------------


def by_hand(use, batch, x):
    """The loss of rows x [N], from lists of numbers; means run over those that train something."""
    mask = batch.array("loss_mask")
    sequences, trajectories = [], {}
    for s, ref in enumerate(batch.refs):
        own = [x[row] for row in range(batch.cu_seqlens[s], batch.cu_seqlens[s + 1]) if mask[row]]
        sequences.append(own)
        trajectories.setdefault((ref.id.group, ref.id.trajectory), []).extend(own)
    sequences = [s for s in sequences if s]
    trajectories = [t for t in trajectories.values() if t]
    tokens = [value for s in sequences for value in s]
    if not tokens:
        return 0.0
    return {
        "token_mean": lambda: sum(tokens) / len(tokens),
        "token_sum": lambda: sum(tokens),
        "sequence_mean": lambda: sum(sum(s) / len(s) for s in sequences) / len(sequences),
        "sequence_mean_token_sum": lambda: sum(sum(s) for s in sequences) / len(sequences),
        "trajectory_mean": lambda: sum(sum(t) / len(t) for t in trajectories) / len(trajectories),
        "constant": lambda: sum(sum(s) for s in sequences) / (len(sequences) * 4),
    }[use]()


@given(batches, st.integers(0, 2**32 - 1))
def test_ragged_batches(batch, seed):
    """With branches, injected tokens and samples that train nothing; rows outside the mask hold NaN."""
    x = np.random.default_rng(seed).normal(size=batch.n_rows)
    ops = ops_of(batch)
    rows = torch.from_numpy(np.where(batch.array("loss_mask"), x, np.nan))
    for use in NAMES:
        weights = aggregation(use)(ops)
        assert weights.dtype == torch.float64 and weights.shape == (batch.n_rows,) and weights.isfinite().all(), use
        assert ops.share(rows, weights).item() == pytest.approx(by_hand(use, batch, x), rel=1e-12, abs=1e-12), use


@pytest.mark.parametrize("use", NAMES)
def test_nothing_trained_is_a_loss_of_zero(use):
    batch = worked_batch(masked=[(s, t) for s in range(2) for t in range(1, 5)])
    ops = ops_of(batch)
    x = torch.full((10,), torch.nan, dtype=torch.float64, requires_grad=True)
    weights = aggregation(use)(ops)
    share = ops.share(x, weights)
    share.backward()
    assert weights.isfinite().all() and share.item() == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("use", NAMES)
def test_a_sequence_of_one_token_weighs_by_its_aggregation(use):
    """Row 1 keeps a single token: a mean over sequences gives it half of the weight, a mean over tokens a fifth."""
    ops = ops_of(worked_batch(masked=[(1, 2), (1, 3), (1, 4)]))
    weight = aggregation(use)(ops)[5].item()
    expected = {"token_mean": 1 / 5, "token_sum": 1, "sequence_mean": 1 / 2, "sequence_mean_token_sum": 1 / 2, "trajectory_mean": 1 / 2}
    assert weight == pytest.approx(expected.get(use, 1 / 8), rel=1e-15)


def test_a_trajectory_weighs_once_however_many_samples_it_has():
    """Trajectory 0 in two branches of 1 and 3 tokens, trajectory 1 in one of 2: halves, not thirds."""
    samples = [answer(sample_id(0, 0), [5], [10]), answer(sample_id(0, 1), [6], [10, 11, 12]), answer(sample_id(1), [5], [10, 11])]
    ops = ops_of(batch_of(samples))
    totals = {use: ops.sum(aggregation(use)(ops)).tolist() for use in ("trajectory_mean", "sequence_mean")}
    assert totals["trajectory_mean"] == pytest.approx([1 / 8, 3 / 8, 1 / 2])
    assert totals["sequence_mean"] == pytest.approx([1 / 3, 1 / 3, 1 / 3])


@given(batches)
def test_weights_are_the_step_s_in_every_part_of_it(batch):
    """A micro-batch has the same weights as the whole, row by row, by every aggregation."""
    ops, parts = ops_of(batch), [ops_of(batch.select([s])) for s in range(len(batch))]
    for use in NAMES:
        whole = aggregation(use)(ops)
        for s, part in enumerate(parts):
            assert torch.equal(aggregation(use)(part), whole[batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]]), use


@pytest.mark.parametrize("options", [{}, {"length": 0}, {"length": -3}])
def test_a_constant_wants_a_length(options):
    with pytest.raises(ValidationError, match="length"):
        built("aggregation", "constant", **options)
