"""Losses on pairs and of the critic against formulas written as loops over pairs and rows, and their finite differences; float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fixtures.losses import Case, answers, built, config, evaluate, pack
from fixtures.samples import random_samples
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

PAIR_TERMS = [
    ("dpo", {}),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2}),
    ("ipo", {}),
    ("ipo", {"tau": 0.5}),
    ("bradley_terry", {}),
]
pair_terms = pytest.mark.parametrize(("use", "options"), PAIR_TERMS, ids=[f"{use} {options}" for use, options in PAIR_TERMS])


def pair_case(seed, *, spread=0.5, untrained=False):
    """Groups of two trajectories of one to three samples, ragged; in some no preference, in some an answer that trains nothing."""
    rng = np.random.default_rng(seed)
    shape = [[rng.integers(1, 8, rng.integers(1, 4)).tolist() for _ in range(2)] for _ in range(rng.integers(1, 6))]
    samples = random_samples(seed, shape=shape)
    for sample in samples:
        if untrained:
            sample.loss_mask[:] = False
    rng.shuffle(samples)
    batch = pack(samples)
    mask, segment = batch.array("loss_mask"), batch.segment
    prefers = {}  # sign of trajectory 0 of each group
    for ref in batch.refs:
        prefers.setdefault(ref.id.group, int(rng.choice([1, -1, 0], p=[0.45, 0.45, 0.1])))
    sign = np.array([prefers[r.id.group] * (1 if r.id.trajectory == 0 else -1) for r in batch.refs], float)
    new = -rng.exponential(size=batch.n_rows)

    def only_trained(x):
        return np.where(mask, x, np.nan)

    columns = {"advantages": only_trained(sign[segment]), "ref_logprobs": only_trained(new + spread * rng.normal(size=batch.n_rows))}
    return Case(batch, {"logprobs": only_trained(new), "values": rng.normal(size=batch.n_rows)}, columns)


cases = st.builds(pair_case, st.integers(0, 2**32 - 1), spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def score(use, case, members):
    """Of one answer: from its samples' trained rows, or (a reward model) from their last rows."""
    ends = case.batch.cu_seqlens[1:] - 1
    if use == "bradley_terry":
        return sum(case.outputs["values"][ends[s]] for s in members)
    rows = [p for s in members for p in range(case.batch.cu_seqlens[s], ends[s]) if case.mask[p]]
    total = sum(case.outputs["logprobs"][p] - case.columns["ref_logprobs"][p] for p in rows)
    return total / len(rows) if use == "ipo" else total


def pairs_of(case):
    """Of each group: the samples of the chosen and of the rejected answer that train something, and all that do."""
    trained = {s for s in range(len(case.batch)) if case.mask[case.batch.segment == s].any()}
    for group in sorted({r.id.group for r in case.batch.refs}):
        members = [s for s in trained if case.batch.refs[s].id.group == group]
        signs = {s: case.columns["advantages"][case.batch.rows_of([s])][case.mask[case.batch.segment == s]][0] for s in members}
        yield [s for s in members if signs[s] > 0], [s for s in members if signs[s] < 0], members


def pair_loss(use, case, chosen, rejected, beta=0.1, label_smoothing=0.0, tau=0.1):
    if not chosen or not rejected:
        return 0.0, 0.0
    margin = score(use, case, chosen) - score(use, case, rejected)
    if use == "dpo":
        return -(1 - label_smoothing) * log_sigmoid(beta * margin) - label_smoothing * log_sigmoid(-beta * margin), margin
    return ((margin - 1 / (2 * tau)) ** 2 if use == "ipo" else -log_sigmoid(margin)), margin


def by_formula(use, case, **options):
    """Mean over trained samples of their pair's loss, of its margin and of who is ahead."""
    found = [(*pair_loss(use, case, chosen, rejected, **options), len(members)) for chosen, rejected, members in pairs_of(case)]
    n = max(sum(count for *_, count in found), 1)
    ahead = sum(count * (np.sign(margin) + 1) / 2 for _, margin, count in found)
    return sum(loss * count for loss, _, count in found) / n, sum(m * count for _, m, count in found) / n, ahead / n


@pair_terms
@given(case=cases)
def test_a_pair_loss_is_its_formula_in_value_gradient_and_metrics(use, options, case):
    got = evaluate(built("loss", use, **options), case, "sequence_mean")
    loss, margin, accuracy = by_formula(use, case, **options)
    assert got.value == pytest.approx(loss, rel=1e-11, abs=1e-12)
    assert got.metrics == {"margin": pytest.approx(margin, rel=1e-11, abs=1e-12), "accuracy": pytest.approx(accuracy, abs=1e-12)}
    name = "values" if use == "bradley_terry" else "logprobs"
    other = "logprobs" if name == "values" else "values"
    assert not got.gradients[other].any()
    ends = case.batch.cu_seqlens[1:] - 1
    read = np.zeros(case.batch.n_rows, bool)
    read[ends if name == "values" else case.mask] = True
    assert (got.gradients[name][~read] == 0).all()
    for row in np.flatnonzero(read)[::5]:
        step = 1e-5
        sides = [by_formula(use, case.moved(name, row, by), **options)[0] for by in (step, -step)]
        assert got.gradients[name][row] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-6 * (1 + abs(loss)))


@pair_terms
@given(case=cases)
def test_micro_batches_of_whole_pairs_add_up(use, options, case):
    loss = built("loss", use, **options)
    whole = evaluate(loss, case, "sequence_mean")
    groups = np.random.default_rng(len(case.batch)).permutation(case.batch.segments.group.max() + 1)
    value, metrics = 0.0, dict.fromkeys(whole.metrics, 0.0)
    for part in np.array_split(groups, min(3, len(groups))):
        samples = np.flatnonzero(np.isin(case.batch.segments.group, part))
        got = evaluate(loss, case.select(samples), "sequence_mean")
        value += got.value
        metrics = {name: metrics[name] + x for name, x in got.metrics.items()}
        for name, gradient in got.gradients.items():
            np.testing.assert_allclose(gradient, whole.gradients[name][case.batch.rows_of(samples)], rtol=1e-10, atol=1e-12)
    assert value == pytest.approx(whole.value, rel=1e-10, abs=1e-10)
    assert metrics == pytest.approx(whole.metrics, rel=1e-10, abs=1e-10)


@pair_terms
@given(case=cases, filler=st.sampled_from([np.inf, -np.inf, 0.0, 1e30]))
def test_what_stands_on_masked_rows_never_leaks(use, options, case, filler):
    loss = built("loss", use, **options)
    nan, other = evaluate(loss, case, "sequence_mean"), evaluate(loss, case.filled(filler), "sequence_mean")
    assert other.value == nan.value and np.isfinite(nan.value) and other.metrics == nan.metrics
    for name, gradient in nan.gradients.items():
        np.testing.assert_array_equal(gradient, other.gradients[name])
        assert np.isfinite(gradient).all()


@pair_terms
@given(seed=st.integers(0, 2**32 - 1))
def test_a_batch_without_a_trained_token_gives_zero(use, options, seed):
    case = pair_case(seed, untrained=True)
    case.outputs["values"][case.batch.cu_seqlens[1:] - 1] = np.nan  # nobody looks at it
    got = evaluate(built("loss", use, **options), case, "sequence_mean")
    assert got.value == 0.0 and not any(gradient.any() for gradient in got.gradients.values())


# ---- by hand -------------------------------------------------------------------------------------------------------------


def worked_pairs(new, reference, signs, lengths=None):
    """Pairs of answers of three tokens (or of the first so many); numbers by answer and token."""
    samples = answers(len(new), [10, 11, 12], per_group=2)
    for sample, n in zip(samples, lengths or [3] * len(new), strict=True):
        sample.loss_mask[1 + n :] = False
    batch = pack(samples)
    rows = [np.append(np.broadcast_to(np.asarray(x, float), 3), np.nan) for x in (*new, *reference, *signs)]
    n = len(new)
    new_rows, ref_rows, sign_rows = (
        np.where(batch.array("loss_mask"), np.concatenate(rows[i * n : (i + 1) * n]), np.nan) for i in range(3)
    )
    return Case(batch, {"logprobs": new_rows, "values": np.zeros(len(new_rows))}, {"ref_logprobs": ref_rows, "advantages": sign_rows})


def test_dpo_by_hand():
    """Log-ratios 0.5 · 3 and −0.2 · 3: margin 2.1; with beta 0.1 the loss is log(1 + e^−0.21)."""
    case = worked_pairs([[-1, -1, -1], [-2, -2, -2]], [-1.5, -1.8], [1, -1])
    got = evaluate(built("loss", "dpo"), case, "sequence_mean")
    assert got.value == pytest.approx(math.log1p(math.exp(-0.21)), rel=1e-12)
    assert got.metrics == pytest.approx({"accuracy": 1.0, "margin": 2.1})
    slope = -0.1 / (1 + math.exp(0.21))  # −beta · σ(−beta·margin), the same on each token of the chosen answer
    np.testing.assert_allclose(got.gradients["logprobs"], [slope, slope, slope, 0, -slope, -slope, -slope, 0], rtol=1e-12)


@pytest.mark.parametrize(("use", "start"), [("dpo", math.log(2)), ("ipo", 25.0), ("bradley_terry", math.log(2))])
def test_where_policy_and_reference_are_equal_it_is_chance(use, start):
    case = worked_pairs([-1, -2, -1, -2], [-1, -2, -1, -2], [1, -1, -1, 1])
    got = evaluate(built("loss", use), case, "sequence_mean")
    assert got.value == pytest.approx(start, rel=1e-12) and got.metrics == {"accuracy": 0.5, "margin": 0.0}


def test_ipo_takes_means_over_tokens():
    """Three tokens of +0.5 against one of −0.3: margin 0.8, target 1 / (2 · 0.5) = 1."""
    case = worked_pairs([-1, -1], [-1.5, -0.7], [1, -1], lengths=[3, 1])
    got = evaluate(built("loss", "ipo", tau=0.5), case, "sequence_mean")
    assert got.value == pytest.approx(0.2**2, rel=1e-12) and got.metrics["margin"] == pytest.approx(0.8)
    np.testing.assert_allclose(got.gradients["logprobs"], np.array([-1, -1, -1, 0, 3, 0, 0, 0]) * 0.4 / 3, rtol=1e-12)


def test_metrics_and_loss_weigh_pairs_alike_whatever_their_lengths():
    """A pair of long answers that is ahead and one of short answers that is behind: accuracy one half, margin the mean of both."""
    case = worked_pairs([-1, -1, -1, -1], [-2, -1, -1, -2], [1, -1, 1, -1], lengths=[3, 3, 1, 1])
    got = evaluate(built("loss", "dpo"), case, "sequence_mean")
    assert got.metrics == pytest.approx({"accuracy": 0.5, "margin": (3 - 1) / 2})
    assert got.value == pytest.approx((math.log1p(math.exp(-0.3)) + math.log1p(math.exp(0.1))) / 2, rel=1e-12)


@pair_terms
@pytest.mark.parametrize("broken", ["no preference", "rejected answer trains nothing"])
def test_a_pair_that_says_nothing_has_no_loss_and_stays_in_the_denominator(use, options, broken):
    lengths, signs = ([3, 3, 3, 3], [1, -1, 0, 0]) if broken == "no preference" else ([3, 3, 3, 0], [1, -1, 1, -1])
    case = worked_pairs([-1, -2, -1, -2], [-1.5, -1.8, -1.2, -1.3], signs, lengths)
    case.outputs["values"][:] = np.arange(16.0) / 10
    alone = case.select([0, 1])
    loss = built("loss", use, **options)
    got, first = (
        evaluate(loss, case, "sequence_mean"),
        evaluate(loss, Case(alone.batch.counted(), alone.outputs, alone.columns), "sequence_mean"),
    )
    trained = 4 if broken == "no preference" else 3
    assert got.value == pytest.approx(first.value * 2 / trained, rel=1e-12) and first.value > 0
    for gradient in got.gradients.values():
        assert not gradient[8:].any()
    assert any(gradient[:8].any() for gradient in got.gradients.values())


def test_a_reward_model_reads_the_last_row_of_each_answer():
    case = worked_pairs([0, 0], [0, 0], [1, -1], lengths=[2, 3])
    case.outputs["values"][:] = [9, 9, 9, 1.5, 9, 9, 9, 0.5]
    got = evaluate(built("loss", "bradley_terry"), case, "sequence_mean")
    assert got.value == pytest.approx(math.log1p(math.exp(-1)), rel=1e-12) and got.metrics["margin"] == pytest.approx(1.0)
    slope = -1 / (1 + math.e)
    np.testing.assert_allclose(got.gradients["values"], [0, 0, 0, slope, 0, 0, 0, -slope], rtol=1e-12)


@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_margins_stay_finite(margin, dtype):
    case = worked_pairs([0, 0], [0, 0], [1, -1])
    case.outputs["values"][3] = margin
    got = evaluate(built("loss", "bradley_terry"), case, "sequence_mean", dtype)
    assert got.value == pytest.approx(0.0 if margin > 0 else 1e4) and np.isfinite(got.gradients["values"]).all()
    case.columns["ref_logprobs"] = case.columns["ref_logprobs"] - np.where(np.arange(8) < 4, margin, 0)
    got = evaluate(built("loss", "dpo", beta=1.0), case, "sequence_mean", dtype)
    assert got.value == pytest.approx(0.0 if margin > 0 else 3e4) and np.isfinite(got.gradients["logprobs"]).all()


def test_pair_terms_declare_what_they_are():
    for use, head, needs in (
        ("dpo", "language", {"pairs", "advantages", "ref_logprobs"}),
        ("ipo", "language", {"pairs", "advantages", "ref_logprobs"}),
        ("bradley_terry", "scalar", {"pairs", "advantages"}),
    ):
        loss = config("loss", use)
        assert (loss.unit, loss.head, loss.required()) == ("pair", head, needs)


# ---- the critic ----------------------------------------------------------------------------------------------------------


def value_case(seed, *, untrained=False):
    rng = np.random.default_rng(seed)
    samples = random_samples(seed)
    for sample in samples:
        if untrained:
            sample.loss_mask[:] = False
    batch = pack(samples)
    mask = batch.array("loss_mask")
    before = rng.normal(size=batch.n_rows)
    columns = {"values": np.where(mask, before, np.nan), "returns": np.where(mask, before + 0.5 * rng.normal(size=batch.n_rows), np.nan)}
    return Case(batch, {"values": before + 0.3 * rng.normal(size=batch.n_rows)}, columns)


value_cases = st.builds(value_case, st.integers(0, 2**32 - 1))


def value_loss(value, before, target, clip):
    plain = (value - target) ** 2 / 2
    held = min(max(value, before - clip), before + clip) if clip else value
    return max(plain, (held - target) ** 2 / 2)


@pytest.mark.parametrize("clip", [0.2, 1.0, None])
@given(case=value_cases)
def test_the_value_loss_is_its_formula(clip, case):
    got = evaluate(built("loss", "value_clip", clip=clip), case)
    tokens = max(int(case.mask.sum()), 1)
    rows = [(case.outputs["values"][p], case.columns["values"][p], case.columns["returns"][p]) for p in np.flatnonzero(case.mask)]
    np.testing.assert_allclose(got.rows[case.mask], [value_loss(*row, clip) for row in rows], rtol=1e-12, atol=1e-15)
    clipped = [value_loss(v, b, r, clip) > (v - r) ** 2 / 2 for v, b, r in rows]
    assert got.metrics == ({} if clip is None else {"clip_fraction": pytest.approx(sum(clipped) / tokens)})
    slopes = []
    for v, b, r in rows:
        step = 1e-6
        right, left = ((value_loss(v + by, b, r, clip) - value_loss(v, b, r, clip)) / by for by in (step, -step))
        slopes.append((right + left) / 2 if abs(right - left) < 1e-4 else None)
    for p, slope in zip(np.flatnonzero(case.mask), slopes, strict=True):
        if slope is not None:
            assert got.gradients["values"][p] == pytest.approx(slope / tokens, abs=1e-6)
    assert (got.gradients["values"][~case.mask] == 0).all()


@given(case=value_cases, filler=st.sampled_from([np.inf, -np.inf, 0.0, 1e30]))
def test_values_of_masked_rows_never_leak_and_micro_batches_add_up(case, filler):
    loss = built("loss", "value_clip")
    whole = evaluate(loss, case)
    strange = replace(case.filled(filler), outputs={"values": np.where(case.mask, case.outputs["values"], filler)})
    other = evaluate(loss, strange)
    assert other.value == whole.value and np.isfinite(whole.value) and other.metrics == whole.metrics
    np.testing.assert_array_equal(other.gradients["values"], whole.gradients["values"])
    parts = [evaluate(loss, case.select([s])) for s in range(len(case.batch))]
    assert sum(p.value for p in parts) == pytest.approx(whole.value, rel=1e-10, abs=1e-12)
    np.testing.assert_allclose(np.concatenate([p.gradients["values"] for p in parts]), whole.gradients["values"], rtol=1e-10, atol=1e-15)


def test_a_critic_without_a_trained_token_has_no_loss():
    got = evaluate(built("loss", "value_clip"), value_case(3, untrained=True))
    assert got.value == 0.0 and not got.gradients["values"].any()


def test_the_value_loss_by_hand():
    """v_old 0, R 1. v 0.1: within the clip, ½·0.81. v 0.5: held at 0.2, ½·0.64, no gradient. v −0.5: −0.2 is nearer, ½·2.25 stays."""
    samples = answers(1, [1, 2, 3])
    columns = {"values": np.array([0.0, 0, 0, np.nan]), "returns": np.array([1.0, 1, 1, np.nan])}
    got = evaluate(built("loss", "value_clip"), Case(pack(samples), {"values": np.array([0.1, 0.5, -0.5, 3.0])}, columns), np.ones(4))
    np.testing.assert_allclose(got.rows[:3], [0.405, 0.32, 1.125], rtol=1e-12)
    np.testing.assert_allclose(got.gradients["values"], [-0.9, 0, -1.5, 0], rtol=1e-12)


def test_the_critics_term_asks_for_old_values_only_to_clip():
    assert config("loss", "value_clip").required() == {"returns", "values"} and config("loss", "value_clip").head == "scalar"
    assert config("loss", "value_clip", clip=None).required() == {"returns"}
