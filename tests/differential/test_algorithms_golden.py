"""Algorithms against golden values of several public implementations, NumPy formulas and finite differences, in float64.

The golden values and the worked input are those of the algorithm notes: two rows of four predicted tokens, the last of row 1
masked; advantage +1 for row 0 and −0.5 for row 1; clip 0.2 / 0.28.
"""

from __future__ import annotations

import numpy as np
import pytest
from fixtures.samples import answer, random_samples, sample_id

from miles_core.batch import Batch
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, LossInputs
from miles_core.refs import SampleRef

NEW = np.array([[-1, -0.5, -2, -0.3], [-0.2, -1.5, -0.7, 0]])
OLD = np.array([[-1.1, -0.9, -1.2, -0.3], [-0.6, -1, -0.9, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
ADVANTAGE = np.array([[1.0], [-0.5]]) * np.ones((2, 4))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def built(point, use, **options):
    """The function a recipe would get."""
    return config_class(point, use).model_validate({"use": use, **options}).build(BuildContext(None, "golden", 0))


def batch_of(samples):
    return Batch.of([SampleRef.of(s) for s in samples])


def worked_batch():
    """Two samples of a prompt token and four sampled ones; the last token of the second is not trained."""
    samples = [answer(sample_id(t), [5], [10, 11, 12, 13], reward=0.0) for t in range(2)]
    samples[1].loss_mask[-1] = False
    return batch_of(samples)


def packed(values):
    """[2, 4] → the batch's ten rows; the last row of a sample predicts nothing."""
    return np.concatenate([np.append(row, np.nan) for row in values])


def loss_and_gradient(torch, batch, loss, logprobs, columns, dtype="float64"):
    """The step's loss, its gradient by ``logprobs`` [N], and the term's own outputs."""
    from miles_core.algorithms.segments import SegmentOps

    ops = SegmentOps.of(batch)
    x = torch.tensor(logprobs, dtype=getattr(torch, dtype), requires_grad=True)
    given = {n: torch.tensor(c, dtype=x.dtype) for n, c in columns.items()}
    outputs = loss(LossInputs({"logprobs": x, "entropy": torch.zeros_like(x)}, given, ops))
    share = ops.share(outputs.loss, built("aggregation", "token_mean")(ops))
    share.backward()
    return share.item(), x.grad.numpy(), outputs


# ---- the clipped surrogate -----------------------------------------------------------------------------------------------


def numpy_ppo(new, old, advantage, mask, low, high):
    """Loss and gradient of the token mean: −min(ρA, clip(ρ)A), and −ρA where the unclipped branch is the smaller one."""
    with np.errstate(all="ignore"):
        ratio = np.exp(new - old)
        plain, clipped = ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage
        loss = -np.minimum(plain, clipped)[mask].mean()
        inside = (ratio >= 1 - low) & (ratio <= 1 + high)
        gradient = np.where(mask & (inside | (plain < clipped)), -plain, 0.0) / mask.sum()
    return loss, gradient


def test_ppo_has_the_golden_value(torch):
    loss = built("loss", "ppo_clip", clip_low=0.2, clip_high=0.28)
    columns = {"old_logprobs": packed(OLD), "advantages": packed(ADVANTAGE)}
    value, gradient, _ = loss_and_gradient(torch, worked_batch(), loss, packed(NEW), columns)
    assert value == pytest.approx(-0.296841, abs=5e-7)
    by_hand = numpy_ppo(NEW, OLD, ADVANTAGE, MASK, 0.2, 0.28)
    assert value == pytest.approx(by_hand[0], rel=1e-12)
    np.testing.assert_allclose(gradient.reshape(2, 5)[:, :4], by_hand[1], rtol=1e-12, atol=0)
    assert (gradient.reshape(2, 5)[:, 4] == 0).all()


def test_the_token_sum_of_the_same_input_is_golden_too(torch):
    """−2.077886: the sum over the seven trained tokens, by an aggregation of weight 1."""
    from miles_core.algorithms.segments import SegmentOps

    batch = worked_batch()
    ops = SegmentOps.of(batch)
    columns = {"old_logprobs": torch.tensor(packed(OLD)), "advantages": torch.tensor(packed(ADVANTAGE))}
    inputs = LossInputs({"logprobs": torch.tensor(packed(NEW)), "entropy": torch.zeros(10)}, columns, ops)
    rows = built("loss", "ppo_clip", clip_low=0.2, clip_high=0.28)(inputs).loss
    assert ops.share(rows, torch.ones(10)).item() == pytest.approx(-2.077886, abs=5e-7)


def random_case(seed, spread=0.5):
    """A ragged batch with branches, injected tokens and untrained samples; NaN wherever nothing is trained."""
    rng = np.random.default_rng(seed)
    batch = batch_of(random_samples(seed, groups=4))
    mask = batch.array("loss_mask")

    def only_trained(x):
        return np.where(mask, x, np.nan)

    old = -rng.exponential(size=batch.n_rows)
    new = old + spread * rng.normal(size=batch.n_rows)
    return batch, mask, only_trained(new), only_trained(old), only_trained(rng.normal(size=batch.n_rows))


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28), (0.1, 3.0)])
@pytest.mark.parametrize("seed", range(5))
def test_ppo_is_the_formula_in_value_and_gradient(torch, seed, clip):
    batch, mask, new, old, advantage = random_case(seed)
    loss = built("loss", "ppo_clip", clip_low=clip[0], clip_high=clip[1])
    columns = {"old_logprobs": old, "advantages": advantage}
    value, gradient, outputs = loss_and_gradient(torch, batch, loss, new, columns)
    expected = numpy_ppo(new, old, advantage, mask, *clip)
    assert value == pytest.approx(expected[0], rel=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-10, atol=1e-15)

    ratio = np.exp(new - old)[mask]
    a = advantage[mask]
    np.testing.assert_array_equal(outputs.metrics["clip_fraction"].numpy()[mask], np.clip(ratio, 1 - clip[0], 1 + clip[1]) * a < ratio * a)
    np.testing.assert_allclose(outputs.metrics["kl"].numpy()[mask], ratio - 1 - np.log(ratio), atol=1e-12)
    assert (outputs.metrics["kl"].numpy()[mask] >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_slope_of_the_value(torch, seed):
    batch, mask, new, old, advantage = random_case(seed)
    loss = built("loss", "ppo_clip")
    columns = {"old_logprobs": old, "advantages": advantage}
    _, gradient, _ = loss_and_gradient(torch, batch, loss, new, columns)
    step = 1e-6
    for row in np.flatnonzero(mask)[::9]:
        ends = []
        for sign in (1, -1):
            moved = new.copy()
            moved[row] += sign * step
            ends.append(loss_and_gradient(torch, batch, loss, moved, columns)[0])
        if min(abs(np.exp(new[row] - old[row]) - edge) for edge in (0.8, 1.2)) > 1e-4:  # not across the corner
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(gradient[row], abs=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 5e-6)])
@pytest.mark.parametrize("log_ratio", [30.0, -30.0, 20.0, -20.0, 0.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_ratios_are_not_clamped_and_stay_finite(torch, log_ratio, sign, dtype, tolerance):
    """ρ up to e³⁰: value and gradient are the formula's."""
    old = np.where(MASK, -1.0, np.nan)
    new, advantage = old + log_ratio, np.where(MASK, sign, np.nan)
    loss = built("loss", "ppo_clip")
    columns = {"old_logprobs": packed(old), "advantages": packed(advantage)}
    value, gradient, outputs = loss_and_gradient(torch, worked_batch(), loss, packed(new), columns, dtype)
    expected = numpy_ppo(new, old, advantage, MASK, 0.2, 0.2)
    assert value == pytest.approx(expected[0], rel=tolerance) and np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.reshape(2, 5)[:, :4], expected[1], rtol=tolerance)
    assert np.isfinite(outputs.metrics["kl"].numpy().reshape(2, 5)[:, :4][MASK]).all()


@pytest.mark.parametrize(
    "loss",
    [{"use": "ppo_clip", "old": "recompute"}, {"use": "ppo_clip", "old": "rollout"}, {"use": "ppo_clip", "old": "current"}, {"use": "nll"}],
)
def test_what_stands_on_masked_rows_never_leaks(torch, loss):
    """NaN, infinity or any number there: value and gradient are the same, and the gradient there is exactly 0."""
    batch, mask, new, before, advantage = random_case(3)
    loss = built("loss", **loss)
    found = []
    for filler in (np.nan, np.inf, -np.inf, 0.0, 1e30):
        fill = [np.where(mask, x, filler) for x in (new, before, advantage)]
        columns = {"old_logprobs": fill[1], "logprobs": fill[1], "advantages": fill[2]}
        found.append(loss_and_gradient(torch, batch, loss, fill[0], columns)[:2])
    for value, gradient in found:
        assert value == found[0][0] and np.isfinite(value)
        np.testing.assert_array_equal(gradient, found[0][1])
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any()


def test_a_batch_without_a_trained_token_gives_zero(torch):
    samples = [answer(sample_id(t), [5], [10, 11], reward=0.0) for t in range(2)]
    for sample in samples:
        sample.loss_mask[:] = False
    nothing = np.full(6, np.nan)
    columns = {"old_logprobs": nothing, "advantages": nothing}
    value, gradient, _ = loss_and_gradient(torch, batch_of(samples), built("loss", "ppo_clip"), nothing, columns)
    assert value == 0.0 and (gradient == 0).all()


def test_the_old_policy_is_the_one_that_was_asked_for(torch):
    batch, mask, new, before, advantage = random_case(1)
    rollout = np.where(mask, before - 0.1, np.nan)
    columns = {"old_logprobs": before, "logprobs": rollout, "advantages": advantage}
    values = {
        old: loss_and_gradient(torch, batch, built("loss", "ppo_clip", old=old), new, columns)[:2]
        for old in ("recompute", "rollout", "current")
    }
    assert values["recompute"][0] == pytest.approx(numpy_ppo(new, before, advantage, mask, 0.2, 0.2)[0], rel=1e-12)
    assert values["rollout"][0] == pytest.approx(numpy_ppo(new, rollout, advantage, mask, 0.2, 0.2)[0], rel=1e-12)
    # Against itself every ratio is 1: the value is −mean A, the gradient the policy gradient −A / tokens.
    assert values["current"][0] == pytest.approx(-advantage[mask].mean(), rel=1e-12)
    np.testing.assert_allclose(values["current"][1][mask], -advantage[mask] / mask.sum(), rtol=1e-12)


def test_nll_is_the_mean_negative_log_probability(torch):
    batch, mask, new, *_ = random_case(2)
    value, gradient, _ = loss_and_gradient(torch, batch, built("loss", "nll"), new, {})
    assert value == pytest.approx(-new[mask].mean(), rel=1e-12)
    np.testing.assert_allclose(gradient, np.where(mask, -1 / mask.sum(), 0.0), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_add_up_to_the_step(torch, seed):
    """However an optimizer step is cut up, the shares add up to its loss, and the gradients are the same numbers."""
    batch, _, new, old, advantage = random_case(seed)
    loss = built("loss", "ppo_clip")
    whole, gradient, _ = loss_and_gradient(torch, batch, loss, new, {"old_logprobs": old, "advantages": advantage})
    order = np.random.default_rng(seed).permutation(len(batch))
    total = 0.0
    for samples in np.array_split(order, 4):
        rows = batch.rows_of(samples)
        columns = {"old_logprobs": old[rows], "advantages": advantage[rows]}
        share, part, _ = loss_and_gradient(torch, batch.select(samples), loss, new[rows], columns)
        total += share
        np.testing.assert_allclose(part, gradient[rows], rtol=1e-12)
    assert total == pytest.approx(whole, rel=1e-12)
