"""Loss terms of a language model against golden values, formulas written as loops over one sequence, and their finite differences.

The worked input is that of the algorithm notes: two rows of four predicted tokens, the last of row 1 masked; advantage +1 for row 0 and
−0.5 for row 1; clip 0.2 / 0.28. Everything in float64 unless it says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.losses import Case, answers, built, config, evaluate, language_case, pack
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

NEW = np.array([[-1, -0.5, -2, -0.3], [-0.2, -1.5, -0.7, 0]])
OLD = np.array([[-1.1, -0.9, -1.2, -0.3], [-0.6, -1, -0.9, 0]])
ROLLOUT = np.array([[-1, -1.4, -1.3, -0.1], [-0.5, -2.2, -0.8, 0]])
REF = np.array([[-1.2, -0.6, -1, -0.5], [-0.3, -1.1, -1.7, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
ADVANTAGE = np.array([[1.0], [-0.5]]) * np.ones((2, 4))
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def packed(values):
    """[2, 4] → the batch's ten rows; the last row of a sample predicts nothing."""
    return np.concatenate([np.append(row, np.nan) for row in values])


def worked_case(new=NEW, **columns):
    """The worked input; a prompt token before the four sampled ones."""
    samples = answers(2, [10, 11, 12, 13])
    samples[1].loss_mask[-1] = False
    given = {"old_logprobs": OLD, "logprobs": ROLLOUT, "ref_logprobs": REF, "advantages": ADVANTAGE} | columns
    return Case(pack(samples), {"logprobs": packed(new)}, {name: packed(x) for name, x in given.items()})


WEIGHTS = {  # of a row, by the definition of each aggregation
    "token mean": MASK / 7,
    "token sum": MASK * 1.0,
    "seq-mean-token-sum": MASK / 2,
    "seq-mean-token-mean": MASK / MASK.sum(1, keepdims=True) / 2,
    "sum over batch × width": MASK / 8,
}


@pytest.mark.parametrize(
    ("use", "options", "weights", "golden"),
    [
        ("ppo_clip", CLIP, "token mean", -0.296841),
        ("ppo_clip", CLIP, "token sum", -2.077886),
        ("ppo_clip", CLIP, "seq-mean-token-sum", -1.038943),
        ("ppo_clip", CLIP, "seq-mean-token-mean", -0.186544),
        ("ppo_clip", CLIP, "sum over batch × width", -0.259736),
        ("gspo", CLIP, "seq-mean-token-mean", -0.205398),
        ("gspo", CLIP | {"token_advantages": True}, "seq-mean-token-mean", -0.205398),
        ("gspo", CLIP, "seq-mean-token-sum", -1.080066),  # LUSPO
        ("cispo", CLIP, "token mean", 0.355669),
        ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}, "seq-mean-token-mean", -0.503931),
        ("sapo", {"tau_positive": 1.0, "tau_negative": 1.05}, "token mean", -0.719443),
        ("kl", {"estimator": "k1"}, "token mean", 0.028571),
        ("kl", {"estimator": "k2"}, "token mean", 0.161429),
        ("kl", {"estimator": "k3"}, "token mean", 0.175017),
        ("kl", {}, "token mean", 0.175017),
    ],
)
def test_golden_values(use, options, weights, golden):
    assert evaluate(built("loss", use, **options), worked_case(), packed(WEIGHTS[weights])).value == pytest.approx(golden, abs=6e-7)


def test_golden_sum_of_a_policy_gradient_and_a_divergence():
    weights = packed(WEIGHTS["seq-mean-token-mean"])
    parts = [evaluate(built("loss", use, **options), worked_case(), weights).value for use, options in (("ppo_clip", CLIP), ("kl", {}))]
    assert parts[0] + 0.1 * parts[1] == pytest.approx(-0.169294, abs=6e-7)


@pytest.mark.parametrize(("name", "golden"), [("token_mean", -0.296841), ("sequence_mean", -0.186544)])
def test_the_aggregations_of_a_recipe_give_the_golden_values_too(name, golden):
    assert evaluate(built("loss", "ppo_clip", **CLIP), worked_case(), name).value == pytest.approx(golden, abs=6e-7)


# ---- each formula, as a loop over the trained rows of one sequence -------------------------------------------------------


@dataclass
class Row:
    """A trained row: ``new`` moves when a difference is taken, ``fixed`` is the same number and stays (a stop-gradient)."""

    new: float
    fixed: float
    old: float
    advantage: float
    entropy: float
    ref: float
    teacher: float
    selected: bool
    weight: float

    @property
    def ratio(self):
        return math.exp(self.new - self.old)


def bounded(x, low, high):
    return min(max(x, low), high)


def ppo_clip(rows, clip_low=0.2, clip_high=0.2, dual_clip=None):
    out = []
    for r in rows:
        loss = -min(r.ratio * r.advantage, bounded(r.ratio, 1 - clip_low, 1 + clip_high) * r.advantage)
        out.append(min(loss, dual_clip * abs(r.advantage)) if dual_clip and r.advantage < 0 else loss)
    return out


def gspo(rows, clip_low=3e-4, clip_high=4e-4, token_advantages=False):
    mean = sum(r.new - r.old for r in rows) / len(rows)
    fixed = sum(r.fixed - r.old for r in rows) / len(rows)
    out = []
    for r in rows:
        s = math.exp(fixed) * math.exp(r.new) / math.exp(r.fixed) if token_advantages else math.exp(mean)
        out.append(-min(s * r.advantage, bounded(s, 1 - clip_low, 1 + clip_high) * r.advantage))
    return out


def cispo(rows, clip_low=0.2, clip_high=0.28):
    return [-bounded(math.exp(r.fixed - r.old), 1 - clip_low, 1 + clip_high) * r.advantage * r.new for r in rows]


def sapo(rows, tau_positive=1.0, tau_negative=1.05):
    out = []
    for r in rows:
        tau = tau_positive if r.advantage > 0 else tau_negative
        x = tau * (r.ratio - 1)
        out.append(-4 / tau / (1 + math.exp(-x)) * r.advantage)
    return out


def dppo(rows, divergence="tv", threshold=None):
    out = []
    for r in rows:
        p, q = math.exp(r.old), math.exp(r.fixed)
        if divergence == "tv":
            distance, limit = abs(q - p), threshold or 0.15
        else:
            tails = 0.0 if p == 1 else (1 - p) * math.log((1 - p) / max(1 - q, 1e-8))
            distance, limit = p * (r.old - r.fixed) + tails, threshold or 0.05
        outward = (r.advantage > 0 and q > p) or (r.advantage < 0 and q < p)
        out.append(0.0 if outward and distance > limit else -r.ratio * r.advantage)
    return out


def gmpo(rows, clip_low=0.4, clip_high=0.4):
    logs = [min(r.new - r.old, clip_high) if r.advantage > 0 else max(r.new - r.old, -clip_low) for r in rows]
    s = math.exp(sum(logs) / len(logs))
    return [-s * r.advantage for r in rows]


def dro(rows, beta=0.05):
    return [-(r.advantage * r.new - beta / 2 * (r.new - r.old) ** 2) for r in rows]


def clip_cov(rows, clip_low=1.0, clip_high=1.0):
    losses = ppo_clip(rows, clip_low, clip_high)
    return [0.0 if r.selected else loss for r, loss in zip(rows, losses, strict=True)]


def kl_cov(rows, penalty=1.0):
    return [-r.ratio * r.advantage + (penalty * abs(r.new - r.old) if r.selected else 0.0) for r in rows]


def reinforce(rows):
    return [-r.advantage * r.new for r in rows]


def opd(rows):
    return [(r.fixed - r.teacher) * r.new for r in rows]


def nll(rows):
    return [-r.new for r in rows]


def entropy(rows):
    return [-r.entropy for r in rows]


def kl(rows, estimator="k3", unbiased=False):
    out = []
    for r in rows:
        d = r.new - r.ref
        held = bounded(d, -20, 20)
        values = {"k1": d, "k2": d * d / 2, "abs": abs(d)}
        k = (
            values[estimator]
            if estimator in values
            else math.exp(-held) - 1 + held
            if estimator == "low_variance"
            else math.exp(-d) - 1 + d
        )
        out.append(r.ratio * k if unbiased else k)
    return out


FORMULAS = {f.__name__: f for f in (ppo_clip, gspo, cispo, sapo, dppo, gmpo, dro, clip_cov, kl_cov, reinforce, opd, nll, entropy, kl)}
NOT_POLICY_GRADIENTS = ("nll", "entropy", "kl")

TERMS = [
    ("ppo_clip", {}),
    ("ppo_clip", {"clip_low": 0.1, "clip_high": 3.0}),
    ("ppo_clip", {"dual_clip": 1.5}),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.2}),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.2, "token_advantages": True}),
    ("cispo", {}),
    ("cispo", {"clip_low": 1.0, "clip_high": 4.0}),
    ("sapo", {}),
    ("sapo", {"tau_positive": 2.0, "tau_negative": 0.5}),
    ("dppo", {}),
    ("dppo", {"threshold": 0.02}),
    ("dppo", {"divergence": "kl"}),
    ("dppo", {"divergence": "kl", "threshold": 0.4}),
    ("gmpo", {}),
    ("gmpo", {"clip_low": 0.1, "clip_high": 0.7}),
    ("dro", {"beta": 0.5}),
    ("clip_cov", {}),
    ("clip_cov", {"clip_low": 0.2, "clip_high": 0.2}),
    ("kl_cov", {"penalty": 0.3}),
    ("reinforce", {}),
    ("opd", {}),
    ("nll", {}),
    ("entropy", {}),
    *(("kl", {"estimator": k}) for k in ("k1", "k2", "k3", "abs", "low_variance")),
    ("kl", {"estimator": "k1", "unbiased": True}),
    ("kl", {"unbiased": True}),
]
NAMES = [" ".join([use, *(f"{k}={v}" for k, v in options.items())]) for use, options in TERMS]


def sequences(case, fixed=None):
    """Of each sample the packed indices of its trained rows and what is on them."""
    out, columns = [], case.columns
    fixed = case.outputs["logprobs"] if fixed is None else fixed
    weights = columns.get("correction_weights", np.ones(case.batch.n_rows))
    for s in range(len(case.batch)):
        where = [p for p in range(case.batch.cu_seqlens[s], case.batch.cu_seqlens[s + 1]) if case.mask[p]]
        rows = [
            Row(
                case.outputs["logprobs"][p],
                fixed[p],
                columns["old_logprobs"][p],
                columns["advantages"][p],
                case.outputs["entropy"][p],
                columns["ref_logprobs"][p],
                columns["teacher_logprobs"][p],
                bool(columns["high_covariance"][p]),
                weights[p],
            )
            for p in where
        ]
        out.append((where, rows))
    return out


def by_formula(use, options, rows):
    """The loss of each row of a sequence; weights of corrections go to policy gradients only."""
    losses = FORMULAS[use](rows, **options) if rows else []
    return losses if use in NOT_POLICY_GRADIENTS else [r.weight * loss for r, loss in zip(rows, losses, strict=True)]


def slope(use, options, rows, step_weights, index, name):
    """Right and left slope of a sequence's weighted loss by one of its numbers."""

    def value(by):
        moved = [replace(r, **{name: getattr(r, name) + by}) if i == index else r for i, r in enumerate(rows)]
        return sum(w * x for w, x in zip(step_weights, by_formula(use, options, moved), strict=True))

    step = 1e-6
    return (value(step) - value(0)) / step, (value(0) - value(-step)) / step, (value(step) - value(-step)) / (2 * step)


cases = st.builds(
    language_case,
    st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 0.1, 0.5, 2.0, 10.0]),
    token_advantages=st.booleans(),
    corrected=st.booleans(),
)


@pytest.mark.parametrize(("use", "options"), TERMS, ids=NAMES)
@given(case=cases)
def test_a_term_is_its_formula_in_value_and_gradient(use, options, case):
    """Rows to 1e-11, the weighted sum too; gradients against differences of the formula, but for corners of it."""
    weights = np.random.default_rng(0).random(case.batch.n_rows)
    got = evaluate(built("loss", use, **options), case, weights)
    total = 0.0
    by = "entropy" if use == "entropy" else "logprobs"
    for where, rows in sequences(case):
        expected = by_formula(use, options, rows)
        np.testing.assert_allclose(got.rows[where], expected, rtol=1e-11, atol=1e-12)
        total += sum(w * x for w, x in zip(weights[where], expected, strict=True))
        for index in range(0, len(rows), 4):
            right, left, middle = slope(use, options, rows, weights[where], index, "entropy" if use == "entropy" else "new")
            scale = 1e-5 * (1 + abs(middle) + max(map(abs, expected)))
            if abs(right - left) < scale:  # no corner within the step
                assert got.gradients[by][where[index]] == pytest.approx(middle, abs=scale)
    assert got.value == pytest.approx(total, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize(("use", "options"), TERMS, ids=NAMES)
def test_few_gradients_are_left_out_for_corners(use, options):
    """The test above would say nothing if every row were passed over."""
    case, weights = language_case(3), np.ones(1000)
    skipped = checked = 0
    for where, rows in sequences(case):
        for index in range(len(rows)):
            right, left, middle = slope(use, options, rows, weights[where], index, "entropy" if use == "entropy" else "new")
            corner = abs(right - left) >= 1e-5 * (1 + abs(middle) + max(map(abs, by_formula(use, options, rows))))
            skipped, checked = skipped + corner, checked + (not corner)
    assert checked > 40 and skipped <= checked / 10


@pytest.mark.parametrize(("use", "options"), TERMS, ids=NAMES)
@given(case=cases)
def test_micro_batches_add_up_to_the_step(use, options, case):
    """However a step is cut up between trajectories: the same loss, gradients and metrics to 1e-10."""
    weights = np.random.default_rng(0).random(case.batch.n_rows)
    loss = built("loss", use, **options)
    whole = evaluate(loss, case, weights)
    units = np.random.default_rng(len(case.batch)).permutation(case.batch.segments.trajectory.max() + 1)
    value, metrics = 0.0, dict.fromkeys(whole.metrics, 0.0)
    for part in np.array_split(units, min(4, len(units))):
        samples = np.flatnonzero(np.isin(case.batch.segments.trajectory, part))
        rows = case.batch.rows_of(samples)
        got = evaluate(loss, case.select(samples), weights[rows])
        value += got.value
        metrics = {name: metrics[name] + x for name, x in got.metrics.items()}
        for name, gradient in got.gradients.items():
            np.testing.assert_allclose(gradient, whole.gradients[name][rows], rtol=1e-10, atol=1e-12)
    assert value == pytest.approx(whole.value, rel=1e-10, abs=1e-10)
    assert metrics == pytest.approx(whole.metrics, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(("use", "options"), TERMS, ids=NAMES)
@given(case=cases, filler=st.sampled_from([np.inf, -np.inf, 0.0, 1e30]))
def test_what_stands_on_masked_rows_never_leaks(use, options, case, filler):
    """NaN, infinity or any number there: value, gradient and metrics are the same, and the gradient there is exactly 0."""
    loss = built("loss", use, **options)
    nan, other = evaluate(loss, case), evaluate(loss, case.filled(filler))
    assert other.value == nan.value and np.isfinite(nan.value)
    assert other.metrics == nan.metrics and np.isfinite(list(nan.metrics.values())).all()
    for name, gradient in nan.gradients.items():
        np.testing.assert_array_equal(gradient, other.gradients[name])
        assert np.isfinite(gradient).all() and (gradient[~case.mask] == 0).all()


@pytest.mark.parametrize(("use", "options"), TERMS, ids=NAMES)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_batch_without_a_trained_token_gives_zero(use, options, seed):
    got = evaluate(built("loss", use, **options), language_case(seed, untrained=True, corrected=True))
    assert got.value == 0.0 and not any(gradient.any() for gradient in got.gradients.values())
    assert all(x == 0.0 for x in got.metrics.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 2e-4)])
@pytest.mark.parametrize("log_ratio", [30.0, -30.0, 20.0, -20.0, 0.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("use", "options"), TERMS, ids=NAMES)
def test_extreme_log_ratios_are_not_clamped_and_stay_finite(use, options, log_ratio, sign, dtype, tolerance):
    """ρ up to e³⁰: rows are the formula's, and gradients and metrics finite."""
    new = np.where(MASK, -31.0, np.nan)
    other = {n: new - log_ratio for n in ("old_logprobs", "logprobs", "ref_logprobs", "teacher_logprobs")}
    case = worked_case(new, **other, advantages=sign * np.abs(ADVANTAGE))
    case = replace(case, outputs=case.outputs | {"entropy": case.outputs["logprobs"]})
    case.columns["high_covariance"] = case.mask & (np.arange(10) % 2 == 0)
    got = evaluate(built("loss", use, **options), case, dtype=dtype)
    for where, rows in sequences(case):
        np.testing.assert_allclose(got.rows[where], by_formula(use, options, rows), rtol=tolerance, atol=1e-30)
    assert all(np.isfinite(g).all() for g in got.gradients.values()) and np.isfinite(list(got.metrics.values())).all()


@pytest.mark.parametrize(("use", "options"), TERMS, ids=NAMES)
def test_terms_compute_in_the_dtype_they_are_given(use, options):
    """Columns come as float32; neither they nor weights in float64 change the dtype of what a term gives (``evaluate`` holds the type)."""
    case = language_case(4, corrected=True, token_advantages=False)
    exact, rounded = evaluate(built("loss", use, **options), case), evaluate(built("loss", use, **options), case, dtype="float32")
    assert rounded.value == pytest.approx(exact.value, rel=2e-4, abs=2e-5)


# ---- what single terms promise beyond their formula ----------------------------------------------------------------------


@pytest.mark.parametrize(("use", "options"), TERMS, ids=NAMES)
def test_nan_on_a_trained_row_is_not_swallowed(use, options):
    """It must reach the loss, where the trainer names the sample, whichever of the term's inputs it stands in."""
    case = language_case(7, spread=0.1)
    row = int(np.flatnonzero(case.mask & ~case.columns["high_covariance"] & (case.columns["advantages"] != 0))[3])
    needs = config("loss", use, **options).required() - {"logprobs"}
    for name in needs | ({"entropy"} if use == "entropy" else {"logprobs"}):
        where = case.outputs if name in case.outputs else case.columns
        spoilt = where[name].copy()
        spoilt[row] = np.nan
        changed = {"outputs": case.outputs | {name: spoilt}} if name in case.outputs else {"columns": case.columns | {name: spoilt}}
        assert np.isnan(evaluate(built("loss", use, **options), replace(case, **changed)).rows[row]), name


RATIO_TERMS = [(use, options) for use, options in TERMS if use in ("ppo_clip", "gspo", "cispo", "sapo", "dppo", "gmpo", "dro")]


@pytest.mark.parametrize(("use", "options"), RATIO_TERMS)
def test_the_old_policy_is_the_one_that_was_asked_for(use, options):
    case = language_case(1, token_advantages=False)
    swapped = replace(case, columns=case.columns | {"old_logprobs": case.columns["logprobs"], "logprobs": case.columns["old_logprobs"]})
    of = {old: evaluate(built("loss", use, **options, old=old), case).value for old in ("recompute", "rollout")}
    assert of["rollout"] == evaluate(built("loss", use, **options, old="recompute"), swapped).value != of["recompute"]
    present = replace(case, columns=case.columns | {"old_logprobs": case.outputs["logprobs"]})
    expected = evaluate(built("loss", use, **options), present)
    current = evaluate(built("loss", use, **options, old="current"), case)
    assert current.value == expected.value
    np.testing.assert_array_equal(current.gradients["logprobs"], expected.gradients["logprobs"])


@pytest.mark.parametrize(("use", "options"), [*RATIO_TERMS, ("reinforce", {}), ("clip_cov", {}), ("kl_cov", {})])
def test_against_itself_every_policy_gradient_is_reinforce(use, options):
    """At ρ = 1 the gradient of every term is −A · weight, which is what makes it a policy gradient."""
    case = language_case(2, spread=0.0, token_advantages=False)
    case.columns["high_covariance"][:] = use == "kl_cov"
    trained = [len(where) for where, _ in sequences(case)]
    weights = np.repeat([1 / max(n, 1) for n in trained], case.batch.lengths)  # gspo and gmpo weigh their sequences so
    got = evaluate(built("loss", use, **options), case, weights)
    expected = np.where(case.mask, -case.columns["advantages"] * weights, 0.0)
    np.testing.assert_allclose(got.gradients["logprobs"], expected, rtol=1e-12, atol=1e-15)
    assert got.metrics.get("kl", 0.0) == pytest.approx(0.0, abs=1e-15)


def test_metrics_of_ppo_are_those_of_its_rows():
    case = language_case(0)
    got = evaluate(built("loss", "ppo_clip", **CLIP, dual_clip=1.5), case)
    ratio = np.exp(case.outputs["logprobs"] - case.columns["old_logprobs"])[case.mask]
    a = case.columns["advantages"][case.mask]
    clipped = np.where(a < 0, (ratio < 0.8) | (ratio > 1.5), (a > 0) & (ratio > 1.28))
    np.testing.assert_array_equal(got.metric_rows["clip_fraction"][case.mask], clipped)
    np.testing.assert_allclose(got.metric_rows["kl"][case.mask], ratio - 1 - np.log(ratio), atol=1e-12)
    assert set(got.metrics) == {"clip_fraction", "kl"} and 0 < got.metrics["clip_fraction"] < 1


def test_the_dual_clip_bounds_the_loss_where_the_advantage_is_negative():
    """Ratios of 5 and 1.1: −A·ρ is 5·|A| and 1.1·|A|; the bound of 3 holds the first and takes its gradient."""
    new = OLD + np.log([[5, 1.1, 5, 1.1], [5, 1.1, 5, 1.1]])
    case = worked_case(new)
    plain, dual = (evaluate(built("loss", "ppo_clip", **options), case) for options in ({}, {"dual_clip": 3.0}))
    np.testing.assert_allclose(plain.rows[5:8], [2.5, 0.55, 2.5])
    np.testing.assert_allclose(dual.rows[5:8], [1.5, 0.55, 1.5])
    np.testing.assert_allclose(dual.gradients["logprobs"][5:8] * 7, [0, 0.55, 0], atol=1e-15)
    np.testing.assert_array_equal(dual.rows[:4], plain.rows[:4])  # positive advantages


def test_gspo_clips_whole_sequences():
    """Bounds so narrow that the first row's ratio 0.928 is clipped to no avail (A > 0) and the second's 1.034 too (A < 0); with the signs
    turned both lose their gradient, on all tokens at once."""
    case = worked_case()
    tight = built("loss", "gspo")
    free = evaluate(tight, case, "sequence_mean")
    ratio = np.exp([(NEW - OLD)[0].mean(), (NEW - OLD)[1, :3].mean()])
    assert free.value == pytest.approx((-ratio[0] + 0.5 * ratio[1]) / 2, rel=1e-12)
    assert free.metrics["clip_fraction"] == 0.0 and (free.gradients["logprobs"][case.mask] != 0).all()
    turned = replace(case, columns=case.columns | {"advantages": -case.columns["advantages"]})
    held = evaluate(tight, turned, "sequence_mean")
    assert held.value == pytest.approx(((1 - 3e-4) - 0.5 * (1 + 4e-4)) / 2, rel=1e-12)
    assert held.metrics["clip_fraction"] == 1.0 and (held.gradients["logprobs"] == 0).all()


@given(case=st.builds(language_case, st.integers(0, 2**32 - 1), token_advantages=st.just(False)))
def test_gspo_and_gspo_token_are_one_where_a_sequence_has_one_advantage(case):
    got = [evaluate(built("loss", "gspo", **CLIP, token_advantages=token), case, "sequence_mean") for token in (False, True)]
    assert got[0].value == pytest.approx(got[1].value, rel=1e-12, abs=1e-15)
    np.testing.assert_allclose(got[0].gradients["logprobs"], got[1].gradients["logprobs"], rtol=1e-9, atol=1e-14)


def test_cispo_has_a_gradient_on_clipped_rows():
    case = worked_case(OLD + np.log(4.0))
    got = evaluate(built("loss", "cispo"), case)
    np.testing.assert_allclose(got.gradients["logprobs"][case.mask] * 7, -1.28 * ADVANTAGE[MASK], rtol=1e-12)
    assert got.metrics["clip_fraction"] == 1.0


@pytest.mark.parametrize(
    ("divergence", "old", "new", "advantage", "masked"),
    [
        ("tv", 0.01, 0.1, 1.0, False),  # the ratio is 10, the distribution hardly moved: PPO would clip
        ("tv", 0.5, 0.7, 1.0, True),
        ("tv", 0.5, 0.7, -1.0, False),  # on the way back
        ("tv", 0.9, 0.7, -1.0, True),  # the ratio is 0.78; mass of 0.2 went away
        ("tv", 0.9, 0.7, 1.0, False),
        ("kl", 0.5, 0.7, 1.0, True),  # 0.0872
        ("kl", 0.5, 0.6, 1.0, False),  # 0.0204
        ("kl", 0.5, 1.0, 1.0, True),
        ("kl", 0.999, 1.0, 1.0, False),  # rounding must not make a certainty of it: not infinite
        ("kl", 1.0, 1.0, 1.0, False),  # 0 · log 0
        ("kl", 1.0, 0.9, -1.0, True),  # 0.105
    ],
)
def test_dppo_masks_by_divergence(divergence, old, new, advantage, masked):
    case = worked_case(np.full((2, 4), math.log(new)), old_logprobs=np.full((2, 4), math.log(old)), advantages=np.full((2, 4), advantage))
    got = evaluate(built("loss", "dppo", divergence=divergence), case)
    assert got.metrics["clip_fraction"] == masked
    assert got.value == pytest.approx(0.0 if masked else -advantage * new / old, rel=1e-12)
    assert (got.gradients["logprobs"][case.mask] == 0).all() == masked


@pytest.mark.parametrize(("old", "new", "masked"), [(-0.7, 1e-7, 4 / 7), (1e-7, -0.7, 3 / 7)])
def test_dppo_takes_a_log_probability_that_rounding_left_above_zero(old, new, masked):
    """Upward on the rows with A > 0, downward on those with A < 0."""
    case = worked_case(np.full((2, 4), new), old_logprobs=np.full((2, 4), old))
    got = evaluate(built("loss", "dppo", divergence="kl"), case)
    assert got.metrics["clip_fraction"] == pytest.approx(masked) and np.isfinite(got.value)


def test_distillation_in_the_loss_is_that_of_the_advantage_at_the_old_weights():
    """The term ``opd`` has the gradient that ppo_clip has with A = −(logp_old − logp_teacher), while the weights are the old ones."""
    case = language_case(6, spread=0.3)
    present = case.outputs["logprobs"]
    advantage = -(present - case.columns["teacher_logprobs"])
    as_advantage = replace(case, columns=case.columns | {"old_logprobs": present, "advantages": advantage})
    of_loss = evaluate(built("loss", "opd"), case)
    np.testing.assert_allclose(
        of_loss.gradients["logprobs"], evaluate(built("loss", "ppo_clip"), as_advantage).gradients["logprobs"], rtol=1e-12
    )
    assert of_loss.metrics["teacher_kl"] == pytest.approx(-advantage[case.mask].mean(), rel=1e-12)


def test_an_entropy_bonus_lowers_the_loss():
    case = language_case(5)
    got = evaluate(built("loss", "entropy"), case)
    assert got.value == pytest.approx(-case.outputs["entropy"][case.mask].mean(), rel=1e-12)
    np.testing.assert_allclose(got.gradients["entropy"][case.mask], -1 / case.mask.sum(), rtol=1e-12)
    assert config("loss", "entropy", coefficient=0.001).coefficient == 0.001


# ---- what is refused -----------------------------------------------------------------------------------------------------


def stage_of(loss, advantage="grpo", **advantage_options):
    """What a loss sees of its stage."""
    model = SimpleNamespace(losses={"loss": loss}, advantage=config("advantage", advantage, **advantage_options))
    return SimpleNamespace(models={"policy": model, "reference": SimpleNamespace(losses={}, advantage=None)}, epochs=1, minibatches=1)


@pytest.mark.parametrize("use", ["gspo", "gmpo"])
def test_a_sequence_ratio_refuses_advantages_that_differ_between_tokens(use):
    loss = config("loss", use)
    assert loss.problems(stage_of(loss)) == []
    assert "'opd' differs between tokens" in loss.problems(stage_of(loss, "opd"))[0]
    assert loss.unit == "sequence"


def test_gspo_says_how_it_may_have_them():
    loss = config("loss", "gspo")
    assert "token_advantages: true" in loss.problems(stage_of(loss, "opd"))[0]
    allowed = config("loss", "gspo", token_advantages=True)
    assert allowed.problems(stage_of(allowed, "opd")) == []


@pytest.mark.parametrize("use", ["ppo_clip", "gspo", "cispo", "sapo", "dppo", "gmpo", "dro", "clip_cov", "kl_cov"])
def test_the_present_policy_as_the_old_one_is_for_one_optimizer_step(use):
    loss = config("loss", use, old="current")
    stage = stage_of(loss)
    stage.minibatches = 2
    assert any("one optimizer step a batch only" in p for p in loss.problems(stage))
    assert not any("one optimizer step a batch only" in p for p in config("loss", use).problems(stage))


@pytest.mark.parametrize("use", ["clip_cov", "kl_cov"])
def test_selection_by_covariance_refuses_the_present_policy(use):
    loss = config("loss", use, old="current")
    assert any("before the step" in p for p in loss.problems(stage_of(loss)))
    assert config("loss", use).problems(stage_of(loss)) == []


def test_the_ratio_on_a_biased_estimator_is_refused():
    assert "unbiased: true is right for k1 and k3" in config("loss", "kl", estimator="k2", unbiased=True).problems(None)[0]
    assert config("loss", "kl", unbiased=True).problems(None) == []


@pytest.mark.parametrize(
    ("use", "options", "needs"),
    [
        ("ppo_clip", {}, {"advantages", "logprobs", "old_logprobs"}),
        ("ppo_clip", {"old": "rollout"}, {"advantages", "logprobs"}),
        ("reinforce", {}, {"advantages"}),
        ("opd", {}, {"teacher_logprobs"}),
        ("nll", {}, set()),
        ("entropy", {}, set()),
        ("kl", {}, {"ref_logprobs"}),
        ("kl", {"unbiased": True}, {"ref_logprobs", "old_logprobs"}),
    ],
)
def test_terms_ask_for_the_columns_they_read_and_no_others(use, options, needs):
    loss = config("loss", use, **options)
    assert loss.required() == needs and loss.head == "language"
    case = language_case(0)
    read = {n: x for n, x in case.columns.items() if n in needs}
    assert np.isfinite(evaluate(built("loss", use, **options), replace(case, columns=read)).value)
    for name in needs - {"logprobs" if options.get("old") != "rollout" else "old_logprobs"}:
        with pytest.raises(KeyError, match=name):
            evaluate(built("loss", use, **options), replace(case, columns={n: x for n, x in read.items() if n != name}))
