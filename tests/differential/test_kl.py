"""KL estimators: golden values, their formulas, and exact expectations over a small vocabulary, of values and of gradients as losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fixtures.losses import Case, answers, built, evaluate, pack
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

NEW = [-1, -0.5, -2, -0.3, -0.2, -1.5, -0.7]  # the notes' worked input, its seven trained rows
REF = [-1.2, -0.6, -1, -0.5, -0.3, -1.1, -1.7]

FORMULAS = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "abs": abs,
    "low_variance": lambda d: math.exp(-min(max(d, -20), 20)) - 1 + min(max(d, -20), 20),
}
SLOPES = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: 1 - math.exp(-d),
    "abs": lambda d: math.copysign(1, d) if d else 0.0,
    "low_variance": lambda d: 1 - math.exp(-d) if abs(d) <= 20 else 0.0,
}


@pytest.mark.parametrize(("use", "golden"), [("k1", 0.028571), ("k2", 0.161429), ("k3", 0.175017), ("low_variance", 0.175017)])
def test_golden_means(use, golden):
    estimate = built("kl", use)(torch.tensor(NEW, dtype=torch.float64), torch.tensor(REF, dtype=torch.float64))
    assert estimate.mean().item() == pytest.approx(golden, abs=6e-7)


@pytest.mark.parametrize("use", FORMULAS)
@given(logprobs=st.lists(st.tuples(st.floats(-40, 0), st.floats(-40, 0)), min_size=1, max_size=8))
def test_value_and_slope_are_the_formula(use, logprobs):
    x = torch.tensor([p for p, _ in logprobs], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([q for _, q in logprobs], dtype=torch.float64)
    estimate = built("kl", use)(x, reference)
    estimate.sum().backward()
    d = [p - q for p, q in logprobs]
    np.testing.assert_allclose(estimate.detach().numpy(), [FORMULAS[use](y) for y in d], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(x.grad.numpy(), [SLOPES[use](y) for y in d], rtol=1e-12, atol=1e-14)
    if use != "k1":
        assert (estimate >= 0).all()


@pytest.mark.parametrize("use", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimators_keep_the_dtype_and_small_differences(use, dtype):
    """exp(−d) − 1 + d would lose all its digits in float32 at d = 1e-4; k3 there is 5e-9 to a few per cent."""
    x, reference = torch.tensor([-1.0, -0.5], dtype=dtype), torch.tensor([-1.0001, -0.5], dtype=dtype)
    estimate = built("kl", use)(x, reference)
    assert estimate.dtype == dtype
    d = (x - reference)[0].item()
    assert estimate[0].item() == pytest.approx(FORMULAS[use](d), rel=0.1 if dtype == torch.float32 else 1e-9)
    assert estimate[1].item() == 0.0


@pytest.mark.parametrize("d", [-19.99, -20.01, -30.0, -200.0, 19.99, 20.01, 30.0])
def test_low_variance_is_k3_up_to_twenty_and_constant_beyond(d):
    """In float32 k3 overflows at d = −200; the guard changes nothing below |20|."""
    x = torch.tensor([d], dtype=torch.float32, requires_grad=True)
    low, k3 = (built("kl", use)(x, torch.zeros(1)) for use in ("low_variance", "k3"))
    assert (low.item() == k3.item()) == (abs(d) < 20) and math.isfinite(low.item())
    low.backward()
    assert (x.grad.item() != 0) == (abs(d) < 20) and math.isfinite(x.grad.item())


# ---- exact expectations: every token of a vocabulary once, weighted by the probability that it is sampled -------------------

logits = st.lists(st.tuples(*[st.floats(-2, 2)] * 3), min_size=2, max_size=6).map(lambda rows: [list(x) for x in zip(*rows, strict=True)])
"""Of the policy, of the policy that sampled and of the reference."""


def softmax(x):
    e = np.exp(np.array(x) - max(x))
    return e / e.sum()


def divergence(p, q):
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def slopes(function, x):
    """Differences of a function of logits."""
    x, step = np.array(x, float), 1e-5
    return np.array([(function(x + step * e) - function(x - step * e)) / (2 * step) for e in np.eye(len(x))])


def expected(use, policy, sampled, reference, **options):
    """Mean of the loss over tokens drawn by ``sampled``, and its gradient by the policy's logits."""
    p, q, r = softmax(policy), softmax(sampled), softmax(reference)
    columns = {"old_logprobs": np.log(q), "ref_logprobs": np.log(r)}
    rows = {n: np.ravel(np.column_stack([x, np.full(len(x), np.nan)])) for n, x in columns.items()}
    case = Case(pack(answers(len(p), [7])), {"logprobs": np.ravel(np.column_stack([np.log(p), np.full(len(p), np.nan)]))}, rows)
    got = evaluate(built("loss", "kl", estimator=use, **options), case, np.repeat(q, 2))
    by_logprob = got.gradients["logprobs"][::2]
    return got.value, by_logprob - p * by_logprob.sum()  # d logp_y / d logit_z = [y = z] − p_z


@given(three=logits)
def test_k1_and_k3_are_unbiased_and_k2_is_not(three):
    policy, _, reference = three
    truth = divergence(softmax(policy), softmax(reference))
    for use in ("k1", "k3", "low_variance"):
        assert expected(use, policy, policy, reference)[0] == pytest.approx(truth, abs=1e-12)


def test_k2_and_abs_are_biased():
    policy, reference = [0.0, 1.0, 2.0], [2.0, 0.0, 0.0]
    truth = divergence(softmax(policy), softmax(reference))
    assert all(abs(expected(use, policy, policy, reference)[0] - truth) > 0.05 for use in ("k2", "abs"))


@given(three=logits)
def test_gradients_as_losses_on_samples_of_the_policy_itself(three):
    """k2: of the divergence; k1: none; k3: of the forward divergence."""
    policy, _, reference = three
    r = softmax(reference)
    np.testing.assert_allclose(expected("k1", policy, policy, reference)[1], 0.0, atol=1e-12)
    truth = slopes(lambda x: divergence(softmax(x), r), policy)
    np.testing.assert_allclose(expected("k2", policy, policy, reference)[1], truth, atol=1e-8)
    forward = slopes(lambda x: divergence(r, softmax(x)), policy)
    np.testing.assert_allclose(expected("k3", policy, policy, reference)[1], forward, atol=1e-8)


@pytest.mark.parametrize("use", ["k1", "k3", "low_variance"])
@given(three=logits)
def test_with_the_ratio_value_and_gradient_are_unbiased_whoever_sampled(use, three):
    """DeepSeek-V3.2's form: the old policy sampled, and yet both are the present policy's."""
    policy, old, reference = three
    r = softmax(reference)
    value, gradient = expected(use, policy, old, reference, unbiased=True)
    assert value == pytest.approx(divergence(softmax(policy), r), abs=1e-12)
    np.testing.assert_allclose(gradient, slopes(lambda x: divergence(softmax(x), r), policy), atol=1e-8)


def test_the_loss_reports_how_many_tokens_the_guard_may_hold():
    samples = answers(1, [1, 2, 3, 4])
    new, reference = np.array([-1.0, -30.0, -0.1, -2.0, np.nan]), np.array([-1.0, -0.5, -30.0, -21.9, np.nan])
    case = Case(pack(samples), {"logprobs": new}, {"ref_logprobs": reference})
    got = evaluate(built("loss", "kl", estimator="low_variance"), case)
    assert got.metrics == {"ref_kl_beyond_20": pytest.approx(0.5)}
