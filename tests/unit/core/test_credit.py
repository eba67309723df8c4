"""Who calls advantages and corrections: what they see, what becomes of what they give, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from fixtures.samples import answer, random_samples, sample_id, two_branches

from miles_core.batch import Batch
from miles_core.errors import DataError, PluginError
from miles_core.plugins import config_class
from miles_core.prefixes import row_owners
from miles_core.protocols import BuildContext, CorrectionOutputs
from miles_core.refs import SampleRef

torch = pytest.importorskip("torch")


def batch_of(samples):
    return Batch.of([SampleRef.of(s) for s in samples])


def annotated(samples, **columns):
    """A batch with log-probabilities as the engine said them, and advantages of 1."""
    batch = batch_of(samples)
    given = {"old_logprobs": batch.array("logprobs"), "advantages": np.ones(batch.n_rows, np.float32)} | columns
    return batch.with_columns({n: np.asarray(c, np.float32) for n, c in given.items()})


def two_answers():
    """Rows 0–2 are sample 0 (two trained, the last predicts nothing), rows 3–6 sample 1 (three trained)."""
    return [answer(sample_id(0), [5], [10, 11], reward=1.0), answer(sample_id(1), [5], [10, 11, 12], reward=0.0)]


def columns_of(batch, advantage, *, weights=None, kl_reward=None):
    from miles_core.algorithms.credit import advantage_columns

    metrics: dict[str, float] = {}
    return advantage_columns(batch, advantage, weights or {}, kl_reward, metrics), metrics


def corrected(batch, **corrections):
    from miles_core.algorithms import credit

    metrics: dict[str, float] = {}
    return credit.corrected(batch, corrections, metrics), metrics


def seen(given, into):
    """An advantage that notes what it is given and answers ``given``."""

    def advantage(inputs):
        into.append(inputs)
        return given(inputs)

    return advantage


def ones(inputs):
    return torch.ones(len(inputs.ops.mask), dtype=torch.float64)


# ---- advantages ------------------------------------------------------------------------------------------------------


def test_an_advantage_sees_rewards_by_sample_parts_and_their_weights():
    samples = two_answers()
    for sample, parts in zip(samples, ({"environment": 0.0, "math": 1.0, "odd": 3.0}, {"environment": 0.5, "math": -0.5}), strict=True):
        sample.rewards = parts
    inputs: list = []
    columns_of(annotated(samples), seen(ones, inputs), weights={"math": 2.0})
    [given] = inputs
    assert given.rewards.dtype == torch.float64 and given.rewards.tolist() == [1, 0]
    assert {n: p.tolist() for n, p in given.parts.items()} == {"environment": [0, 0.5], "math": [1, -0.5]}  # what all have
    assert given.weights == {"math": 2.0} and given.token_rewards is None
    assert given.ops.sequence_tokens.tolist() == [2, 3]


def test_several_columns_come_back_in_float32():
    given, _ = columns_of(annotated(two_answers()), lambda inputs: {"advantages": ones(inputs), "returns": 2 * ones(inputs)})
    assert {n: (c.dtype, c.tolist()) for n, c in given.items()} == {
        "advantages": (np.float32, [1.0] * 7),
        "returns": (np.float32, [2.0] * 7),
    }


def test_a_kl_penalty_is_what_each_trained_token_earns():
    """−0.1 · (old − reference), by k1; rows outside the mask earn nothing, whatever stands there. The metric is the divergence."""
    old, reference = [-1, -2, np.nan, -1, -1, -1, np.inf], [-1.5, -1, 7, -1, -2, -1, np.nan]
    batch = annotated(two_answers(), old_logprobs=old, ref_logprobs=reference)
    estimator = config_class("kl", "k1").model_validate({"use": "k1"}).build(BuildContext(None, "t", 0))
    inputs: list = []
    _, metrics = columns_of(batch, seen(ones, inputs), kl_reward=(estimator, 0.1))
    np.testing.assert_allclose(inputs[0].token_rewards.numpy(), [-0.05, 0.1, 0, 0, -0.1, 0, 0], atol=1e-15)
    assert metrics == {"kl_reward/mean": pytest.approx((0.5 - 1 + 1) / 5)}


def test_rows_that_branches_share_are_counted_once():
    """Branches 10 11 12 and 10 11 20 21 share the rows that predict 10 and 11: seven trained rows are five of ``counted``."""
    batch = annotated(two_branches())
    batch = replace(batch, owners=row_owners(batch)).with_columns({"ref_logprobs": batch.array("old_logprobs") - 1})
    reference = batch.array("ref_logprobs").copy()
    reference[3] -= 3  # the row that predicts 12, which only branch 0 has
    estimator = config_class("kl", "k1").model_validate({"use": "k1"}).build(BuildContext(None, "t", 0))
    inputs: list = []
    _, metrics = columns_of(batch.with_columns({"ref_logprobs": reference}), seen(ones, inputs), kl_reward=(estimator, 1.0))
    [given] = inputs
    assert given.ops.tokens == 7 and given.counted.tokens == 5 and given.counted.sequence_tokens.tolist() == [3, 2]
    assert given.owners.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 8, 9, 10]
    assert metrics == {"kl_reward/mean": pytest.approx((1 + 1 + 4 + 1 + 1) / 5)}


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e39])
def test_an_advantage_that_is_not_finite_names_its_sample(odd):
    """1e39 is finite until it is a float32."""

    def advantage(inputs):
        return torch.where(torch.arange(7) == 4, odd, ones(inputs))

    with pytest.raises(DataError, match=r"the advantage's 'advantages' is (nan|inf) for sample policy/g0/t1"):
        columns_of(annotated(two_answers()), advantage)


def test_what_an_advantage_says_outside_the_mask_is_nobody_s_business():
    given, _ = columns_of(annotated(two_answers()), lambda inputs: torch.where(inputs.ops.mask, ones(inputs), np.nan))
    assert np.isnan(given["advantages"]).tolist() == [False, False, True, False, False, False, True]


def test_an_advantage_of_another_shape_is_refused():
    with pytest.raises(PluginError, match=r"'advantages' of shape \[2\]; expected one a row, \[7\]"):
        columns_of(annotated(two_answers()), lambda inputs: inputs.rewards)


# ---- corrections -----------------------------------------------------------------------------------------------------


def of(weights=None, keep=None, **metrics):
    """A correction that gives just this."""
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return lambda inputs: CorrectionOutputs(weights, None if keep is None else torch.tensor(keep, dtype=torch.bool), metrics)


def test_without_weights_they_are_one():
    batch, metrics = corrected(annotated(two_answers()), looks=of(seen=3.0))
    assert batch.array("correction_weights").dtype == np.float32
    assert batch.array("correction_weights").tolist() == [1.0] * 7 and metrics == {"correction/looks/seen": 3.0}
    assert batch.segments.tokens == 5


def test_weights_multiply_on_trained_rows_only():
    odd = np.nan  # on rows that predict nothing
    batch, _ = corrected(annotated(two_answers()), a=of([2, 0.5, odd, 1, 1, 4, odd]), b=of([3, 4, odd, 0, 1, 0.5, odd]))
    assert batch.array("correction_weights").tolist() == [6, 2, 1, 0, 1, 2, 1]
    assert batch.segments.tokens == 5  # a weight of 0 stays in the denominators


def test_dropped_rows_leave_the_denominators_and_the_corrections_that_follow():
    """The first takes sample 0 out, the second one row of sample 1; the share is of what was still there."""
    inputs: list = []

    def second(given):
        inputs.append(given)
        return of(keep=[True, True, True, True, False, True, True])(given)

    first = of([9.0] * 7, keep=[False, False, False, True, True, True, True])
    batch, metrics = corrected(annotated(two_answers()), first=first, second=second)
    assert inputs[0].ops.tokens == 3 and inputs[0].ops.sequences == 1
    assert batch.array("loss_mask").tolist() == [False, False, False, True, False, True, False]
    assert (batch.segments.tokens, batch.segments.sequences, batch.segments.trajectories) == (2, 1, 1)
    assert batch.segments.sequence_tokens.tolist() == [0, 2]
    assert metrics == {"correction/first/dropped": pytest.approx(2 / 5), "correction/second/dropped": pytest.approx(1 / 3)}


def test_keep_cannot_bring_back_what_is_not_trained():
    samples = two_answers()
    samples[0].loss_mask[1] = False
    batch, metrics = corrected(annotated(samples), all=of(keep=[True] * 7))
    assert batch.segments.tokens == 4 and metrics == {"correction/all/dropped": 0.0}


def test_everything_may_be_dropped():
    batch, metrics = corrected(annotated(two_answers()), none=of(keep=[False] * 7), more=of(keep=[False] * 7))
    assert batch.segments.tokens == 0 and metrics == {"correction/none/dropped": 1.0, "correction/more/dropped": 1.0}


def test_steps_stay_and_count_anew():
    """Two optimizer steps, planned before: each has the denominators of what is left of it."""
    batch = annotated(two_answers()).with_steps([np.array([0]), np.array([1])])
    batch, _ = corrected(batch, some=of(keep=[True, False, True, True, True, True, True]))
    assert [step.segments.tokens for step in batch.optimizer_steps()] == [1, 3]


def test_what_a_correction_sees_is_float64():
    inputs: list = []

    def look(given):
        inputs.append(given)
        return CorrectionOutputs()

    batch = annotated(two_answers(), old_logprobs=[-1, -2, 0, -3, -4, -5, 0])
    corrected(batch, look=look)
    [given] = inputs
    assert {given.trainer.dtype, given.rollout.dtype, given.advantages.dtype} == {torch.float64}
    assert given.trainer.tolist() == [-1, -2, 0, -3, -4, -5, 0]
    np.testing.assert_array_equal(given.rollout.numpy(), batch.array("logprobs").astype(np.float64))


@pytest.mark.parametrize("column", ["old_logprobs", "logprobs"])
def test_a_trained_token_without_log_probability_is_refused_by_name(column):
    batch = annotated(two_answers())
    values = batch.array(column).copy()
    values[4] = np.nan
    with pytest.raises(DataError, match=f"correction 'tis': a trained token of sample policy/g0/t1.* has no {column}"):
        corrected(batch.with_columns({column: values}), tis=of())
    values[4], values[6] = -1.0, np.nan  # the row that predicts nothing
    assert corrected(batch.with_columns({column: values}), tis=of())[0].segments.tokens == 5


@pytest.mark.parametrize("weights", [[np.inf], [np.nan], [1e39], [1e20, 1e20]])
def test_weights_that_are_not_finite_in_float32_are_refused_by_name(weights):
    """Alone or as a product."""
    corrections = {f"c{i}": of([1, 1, 1, 1, w, 1, 1]) for i, w in enumerate(weights)}
    with pytest.raises(DataError, match=rf"after correction 'c{len(weights) - 1}' a weight is (inf|nan) for sample policy/g0/t1"):
        corrected(annotated(two_answers()), **corrections)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (of([1.0, 1.0]), r"'odd' gave weights as torch.float64 of shape \[2\]; expected one number a row, \[7\]"),
        (of(keep=[True]), r"'odd' gave keep as torch.bool of shape \[1\]; expected one bool a row, \[7\]"),
        (lambda inputs: CorrectionOutputs(keep=torch.ones(7)), r"'odd' gave keep as torch.float32 of shape \[7\]; expected one bool a row"),
    ],
)
def test_something_else_than_one_a_row_is_refused(given, message):
    with pytest.raises(PluginError, match=message):
        corrected(annotated(two_answers()), odd=given)


def test_losses_read_the_weights():
    """A policy-gradient term is multiplied row by row; one that is not stays."""
    from miles_core.algorithms.segments import SegmentOps
    from miles_core.protocols import LossInputs

    batch = batch_of(random_samples(3, groups=3))
    advantages = np.random.default_rng(0).normal(size=batch.n_rows)
    batch = batch.with_columns({"old_logprobs": batch.array("logprobs"), "advantages": advantages})
    weighted, _ = corrected(batch, twice=lambda inputs: CorrectionOutputs(2 * torch.ones_like(inputs.trainer)))
    mask = torch.from_numpy(batch.array("loss_mask"))

    def rows(use, batch):
        loss = config_class("loss", use).model_validate({"use": use}).build(BuildContext(None, "t", 0))
        columns = batch.tensors()
        return partial(loss, LossInputs({"logprobs": columns["logprobs"].double()}, columns, SegmentOps.of(batch)))().loss[mask]

    assert torch.equal(rows("ppo_clip", weighted), 2 * rows("ppo_clip", batch)) and (rows("ppo_clip", batch) != 0).any()
    assert torch.equal(rows("nll", weighted), rows("nll", batch))
