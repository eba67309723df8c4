"""Corrections against the golden values of the algorithm notes and loops written from their formulas, in float64.

The worked input is that of the notes; ratios are trainer (old) over rollout. What reaches the loss goes through
``credit.corrected``, as in the loop: weights multiply the rows of PPO, dropped rows leave the denominators.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from fixtures.samples import answer, random_samples, sample_id
from fixtures.strategies import batches
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from miles_core.batch import Batch
from miles_core.errors import DataError
from miles_core.plugin_finding import find_all
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, CorrectionInputs, LossInputs
from miles_core.refs import SampleRef

torch = pytest.importorskip("torch")

NEW = np.array([[-1, -0.5, -2, -0.3], [-0.2, -1.5, -0.7, 0]])
OLD = np.array([[-1.1, -0.9, -1.2, -0.3], [-0.6, -1, -0.9, 0]])
ROLLOUT = np.array([[-1, -1.4, -1.3, -0.1], [-0.5, -2.2, -0.8, 0]])
ADVANTAGE = np.array([[1.0], [-0.5]]) * np.ones((2, 4))
INF = math.inf


def built(point, use, **options):
    """The function a recipe would get."""
    return config_class(point, use).model_validate({"use": use, **options}).build(BuildContext(None, "corrections", 0))


def batch_of(samples):
    return Batch.of([SampleRef.of(s) for s in samples])


def packed(values):
    """[2, 4] → the batch's ten rows; the last row of a sample predicts nothing."""
    return np.concatenate([np.append(row, np.nan) for row in values])


def worked_batch(old=OLD, rollout=ROLLOUT):
    """Two samples of a prompt token and four sampled ones; the last token of the second is not trained."""
    samples = [answer(sample_id(t), [5], [10, 11, 12, 13], reward=0.0) for t in range(2)]
    samples[1].loss_mask[-1] = False
    columns = {"old_logprobs": packed(old), "logprobs": packed(rollout), "advantages": packed(ADVANTAGE)}
    return batch_of(samples).with_columns(columns)


def ops_of(batch):
    from miles_core.algorithms.segments import SegmentOps

    return SegmentOps.of(batch)


def corrected(batch, *corrections):
    """The batch after corrections ``(name, options)``, and the metrics."""
    from miles_core.algorithms import credit

    metrics: dict[str, float] = {}
    functions = {f"{i}": built("ratio_correction", use, **options) for i, (use, options) in enumerate(corrections)}
    return credit.corrected(batch, functions, metrics), metrics


def ppo(batch, new=NEW, clip=(0.2, 0.28)):
    """PPO's token mean over a batch, and its gradient by the current log-probabilities."""
    ops = ops_of(batch)
    logprobs = torch.tensor(packed(new), requires_grad=True)
    columns = {n: torch.from_numpy(c).double() for n, c in batch.columns.items()}
    rows = built("loss", "ppo_clip", clip_low=clip[0], clip_high=clip[1])(LossInputs({"logprobs": logprobs}, columns, ops)).loss
    loss = ops.share(rows, built("aggregation", "token_mean")(ops))
    loss.backward()
    return loss.item(), logprobs.grad.numpy()


# ---- golden ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corrections", "golden"),
    [
        ([], -0.296841),
        ([("tis", {})], -0.342595),  # truncated at 2, the default
        ([("tis", {"high": 2.0})], -0.342595),
        ([("icepop", {"low": 0.5, "high": 2.0})], -0.456881),
        ([("sequence_mask_tis", {"low": 0.5, "high": 2.0})], -0.267160),  # the gate is open
        ([("sequence_mask_tis", {"low": 0.8, "high": 1.2})], -0.632240),  # row 1's geometric mean is 1.3956
        ([("tis", {"high": INF})], -0.267160),  # nothing is truncated: the weights of the open gate
    ],
)
def test_ppo_has_the_golden_value(corrections, golden):
    batch, _ = corrected(worked_batch(), *corrections)
    assert ppo(batch)[0] == pytest.approx(golden, abs=6e-7)


def test_gated_and_masked_rows_differ_in_the_denominator():
    """IcePop divides by 7 tokens, MIS by the 6 that are inside: the same numerator."""
    zeroed, _ = corrected(worked_batch(), ("icepop", {"low": 0.5, "high": 2.0}))
    dropped, metrics = corrected(worked_batch(), ("mis", {"low": 0.5, "high": 2.0}))
    assert zeroed.segments.tokens == 7 and dropped.segments.tokens == 6
    assert dropped.segments.sequence_tokens.tolist() == [4, 2]
    assert ppo(dropped)[0] == pytest.approx(ppo(zeroed)[0] * 7 / 6, rel=1e-12)
    assert metrics["correction/0/dropped"] == pytest.approx(1 / 7) and metrics["correction/0/above"] == pytest.approx(1 / 7)


# ---- every formula, by loops over samples and their trained tokens ----------------------------------------------------


def log_ratio(trainer, rollout):
    return 0.0 if trainer == rollout else trainer - rollout


def exp(x):
    return INF if x > 709 else math.exp(x)  # NaN stays NaN


def by_hand(use, options, trainer, rollout, advantages):
    """One sequence, as lists of its trained tokens: (weights, keep)."""
    d = [log_ratio(t, r) for t, r in zip(trainer, rollout, strict=True)]
    n, low, high = len(d), options.get("low"), options.get("high")
    ratios = [exp(x) for x in d]
    mean = sum(d) / n
    if options.get("level") == "sequence":
        ratios = [exp(sum(d))] * n
    if options.get("level") == "geometric":
        ratios = [exp(mean)] * n
    everything = [True] * n
    if use == "tis":
        return [w if math.isnan(w) else min(max(w, low), high) for w in ratios], everything
    if use in ("mis", "icepop"):
        inside = [low <= w <= high for w in ratios]
        weights = [w if i else 0.0 for w, i in zip(ratios, inside, strict=True)]
        return weights, inside if use == "mis" else everything
    if use == "sequence_mask_tis":
        return ratios if low <= exp(mean) <= high else [0.0] * n, everything
    if use == "veto":
        return None, [not any(w < options["threshold"] for w in ratios)] * n
    if use == "off_policy_mask":
        far = not -mean <= options["threshold"]
        return [0.0 if far and a < 0 else 1.0 for a in advantages], everything
    assert use == "reject"
    statistic = {"k1": lambda x: -x, "k2": lambda x: x * x / 2, "k3": lambda x: INF if x == INF else math.expm1(x) - x if x < 709 else INF}
    k = [statistic[options["statistic"]](x) for x in d]

    def small(x):
        return abs(x) <= options["threshold"]

    if options["reduce"] == "none":
        return None, [small(x) for x in k]
    return None, [{"sum": small(sum(k)), "mean": small(sum(k) / n), "max": all(map(small, k))}[options["reduce"]]] * n


LEVELS = ("token", "sequence", "geometric")
CASES: list[tuple[str, dict]] = [
    *(("tis", {"level": level, "low": low, "high": high}) for level in LEVELS for low, high in ((0.0, 2.0), (0.5, 1.3))),
    *(("mis", {"level": level, "low": low, "high": high}) for level in LEVELS for low, high in ((0.5, 2.0), (0.0, 1.3))),
    ("icepop", {"low": 0.5, "high": 5.0}),
    ("icepop", {"low": 0.9, "high": 1.1}),
    ("sequence_mask_tis", {"low": 0.8, "high": 1.25}),
    ("sequence_mask_tis", {"low": 0.01, "high": 100.0}),
    ("veto", {"threshold": 1e-4}),
    ("veto", {"threshold": 0.5}),
    ("off_policy_mask", {"threshold": 1e-4}),
    ("off_policy_mask", {"threshold": 0.3}),
    *(
        ("reject", {"statistic": k, "reduce": reduce, "threshold": threshold})
        for k, reduce, threshold in itertools.product(("k1", "k2", "k3"), ("none", "sum", "mean", "max"), (0.05, 0.6))
    ),
]


USES = sorted({use for use, _ in CASES})


def options_of(use):
    """Any of its cases."""
    return st.sampled_from([options for name, options in CASES if name == use])


def random_columns(batch, seed, *, extremes=()):
    """Log-probabilities of trainer and rollout that differ by about 0.3, some rows by ``extremes``; NaN where nothing is trained."""
    rng = np.random.default_rng(seed)
    rollout = -rng.exponential(size=batch.n_rows)
    difference = 0.3 * rng.normal(size=batch.n_rows) * rng.choice([0.1, 1.0])
    for extreme in extremes:
        difference = np.where(rng.random(batch.n_rows) < 0.1, extreme, difference)
    with np.errstate(invalid="ignore"):
        trainer = np.where(np.isposinf(difference), rollout, rollout + difference)
        rollout = np.where(np.isposinf(difference), -np.inf, rollout)  # a ratio of ∞: the engine found its own token impossible
    both = rng.random(batch.n_rows) < (0.05 if extremes else 0)
    trainer, rollout = np.where(both, -np.inf, trainer), np.where(both, -np.inf, rollout)
    mask = batch.array("loss_mask")
    sign = rng.choice([-1.0, 1.0], len(batch))[batch.segment]
    return [np.where(mask, x, np.nan) for x in (trainer, rollout, sign * rng.random(batch.n_rows))]


def compare(use, options, batch, columns):
    """The correction on a whole batch, and each of its sequences by hand."""
    tensors = [torch.from_numpy(c) for c in columns]
    out = built("ratio_correction", use, **options)(CorrectionInputs(*tensors, ops_of(batch)))
    mask = batch.array("loss_mask")
    weights, keep = (None if x is None else x.numpy() for x in (out.weights, out.keep))
    assert weights is None or (weights.dtype == np.float64 and not out.weights.requires_grad)
    assert keep is None or keep.dtype == bool
    for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        rows = [row for row in range(start, end) if mask[row]]
        if not rows:
            continue
        expected_weights, expected_keep = by_hand(use, options, *([float(c[r]) for r in rows] for c in columns))
        assert (np.ones(len(rows), bool) if keep is None else keep[rows]).tolist() == expected_keep
        if expected_weights is None:
            assert weights is None
        else:
            np.testing.assert_allclose(weights[rows], expected_weights, rtol=1e-12)
    return out


@pytest.mark.parametrize("use", USES)
@given(st.data(), batches, st.integers(0, 2**32 - 1))
def test_ragged_batches(use, data, batch, seed):
    options = data.draw(options_of(use))
    out = compare(use, options, batch, random_columns(batch, seed))
    assert all(math.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("use", USES)
@given(st.data(), batches, st.integers(0, 2**32 - 1), st.sampled_from([(30.0, -30.0), (INF,), (-INF,), (INF, -INF, 30.0), (800.0, -800.0)]))
def test_log_ratios_of_thirty_and_infinity(use, data, batch, seed, extremes):
    """Weights are finite wherever the bounds are, but where a sequence has ratios 0 and ∞, which is no number to truncate."""
    options = data.draw(options_of(use))
    with np.errstate(invalid="ignore", over="ignore"):
        out = compare(use, options, batch, random_columns(batch, seed, extremes=extremes))
    if out.weights is not None:
        weights = out.weights[torch.from_numpy(batch.array("loss_mask"))]
        assert not weights.isinf().any() or use == "sequence_mask_tis"
        assert not weights.isnan().any() or (use == "tis" and options["level"] != "token" and len(extremes) > 1)


def test_the_rows_outside_the_mask_and_empty_samples_are_nothing():
    """Whatever stands there: NaN, infinity or a number; metrics too."""
    batch = batch_of(random_samples(4, groups=4))
    mask = batch.array("loss_mask")
    assert (batch.segments.sequence_tokens == 0).any()
    columns, ops = random_columns(batch, 0), ops_of(batch)
    for use, options in CASES:
        found = []
        for filler in (np.nan, np.inf, -np.inf, 1e300):
            tensors = [torch.from_numpy(np.where(mask, c, filler)) for c in columns]
            out = built("ratio_correction", use, **options)(CorrectionInputs(*tensors, ops))
            rows = [x[torch.from_numpy(mask)].tolist() for x in (out.weights, out.keep) if x is not None]
            found.append((rows, out.metrics))
        assert all(f == found[0] for f in found), use


def test_every_registered_correction_is_here():
    assert set(USES) == {name for name, found in find_all("ratio_correction").items() if "miles_core.algorithm_configs" in found.origin}


@pytest.mark.parametrize(("use", "options"), CASES)
def test_nothing_trained(use, options):
    samples = [answer(sample_id(t), [5], [10, 11], reward=0.0) for t in range(2)]
    for sample in samples:
        sample.loss_mask[:] = False
    nothing = torch.full((6,), torch.nan, dtype=torch.float64)
    out = built("ratio_correction", use, **options)(CorrectionInputs(nothing, nothing, nothing, ops_of(batch_of(samples))))
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("use", USES)
@given(st.data(), batches, st.integers(0, 2**32 - 1))
def test_the_trainer_that_samples_what_it_trains_is_left_alone(use, data, batch, seed):
    """Equal log-probabilities (−inf too): weight 1, everything stays."""
    options = data.draw(options_of(use))
    trainer, _, advantages = random_columns(batch, seed, extremes=(-INF,))
    tensors = [torch.from_numpy(c) for c in (trainer, trainer, advantages)]
    out = built("ratio_correction", use, **options)(CorrectionInputs(*tensors, ops_of(batch)))
    mask = torch.from_numpy(batch.array("loss_mask"))
    assert out.weights is None or (out.weights[mask] == 1).all()
    assert out.keep is None or out.keep[mask].all()


# ---- what each is for ------------------------------------------------------------------------------------------------


def test_a_sequence_is_weighed_by_the_product_of_its_trained_tokens_only():
    """Row 0: e^(−3.5 + 3.8), row 1: e^(−2.5 + 3.5); its fourth token is not trained, whatever stands there."""
    old = OLD + [[0, 0, 0, 0], [0, 0, 0, 7]]
    batch, metrics = corrected(worked_batch(old), ("tis", {"level": "sequence", "high": INF}))
    weights = batch.array("correction_weights").reshape(2, 5)
    np.testing.assert_allclose(weights[0, :4], math.exp(0.3), rtol=1e-6)
    np.testing.assert_allclose(weights[1], [math.exp(1.0)] * 3 + [1.0, 1.0], rtol=1e-6)
    assert metrics["correction/0/weight_mean"] == pytest.approx((4 * math.exp(0.3) + 3 * math.e) / 7, rel=1e-9)
    total, squares = 4 * math.exp(0.3) + 3 * math.e, 4 * math.exp(0.6) + 3 * math.e**2
    assert metrics["correction/0/ess"] == pytest.approx(total**2 / (7 * squares), rel=1e-9)


def test_metrics_of_weights_are_shares_of_trained_rows():
    """The ratios of the worked input: .9048 1.6487 1.1052 .8187 | .9048 3.3201 .9048; bounds are inside."""
    w = np.exp((OLD - ROLLOUT)[[0, 0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2]])

    def ess(x):
        return x.sum() ** 2 / (len(x) * (x**2).sum())

    low, high = float(w[3]), float(w[1])
    metrics = {use: corrected(worked_batch(), (use, {"low": low, "high": high}))[1] for use in ("tis", "mis", "icepop")}
    inside, clipped = np.delete(w, 5), np.where(w > high, high, w)
    expected = {
        "tis": {"truncated": 1 / 7, "weight_mean": clipped.mean(), "ess": ess(clipped)},
        "mis": {"below": 0.0, "above": 1 / 7, "dropped": 1 / 7, "weight_mean": inside.mean(), "ess": ess(inside)},
        "icepop": {"masked": 1 / 7, "weight_mean": inside.sum() / 7, "ess": inside.sum() ** 2 / (7 * (inside**2).sum())},
    }
    for use, found in metrics.items():
        assert found == pytest.approx({f"correction/0/{name}": value for name, value in expected[use].items()}, rel=1e-12), use
    _, below = corrected(worked_batch(), ("mis", {"low": float(w[4]) + 1e-9, "high": 9.0}))
    assert below["correction/0/below"] == pytest.approx(4 / 7) and below["correction/0/above"] == 0
    _, gated = corrected(worked_batch(), ("sequence_mask_tis", {"low": 0.8, "high": 1.2}))
    assert gated["correction/0/masked"] == pytest.approx(3 / 7)
    _, rejected = corrected(worked_batch(), ("reject", {"threshold": 0.45, "statistic": "k1", "reduce": "none"}))
    assert rejected["correction/0/rows"] == pytest.approx(2 / 7) == rejected["correction/0/dropped"]


def test_decoupled_ppo_is_ppo_with_the_untruncated_weight():
    """AReaL's objective: behaviour = rollout, proximal = recomputed before the step, current; value and gradient by loops."""
    batch, _ = corrected(worked_batch(), ("tis", {"high": INF}))
    exact = np.exp(packed(OLD) - packed(ROLLOUT))  # the column is float32
    value, gradient = ppo(batch.with_columns({"correction_weights": exact}))
    np.testing.assert_allclose(batch.array("correction_weights")[batch.array("loss_mask")], exact[batch.array("loss_mask")], rtol=1e-6)

    total, slopes = 0.0, np.zeros((2, 5))
    for i, j in itertools.product(range(2), range(4)):
        if (i, j) == (1, 3):
            continue
        a = ADVANTAGE[i, j]
        behaviour, proximal, current = (math.exp(x[i, j]) for x in (ROLLOUT, OLD, NEW))
        ratio = current / proximal
        bounded = min(max(ratio, 0.8), 1.28)
        total -= proximal / behaviour * min(ratio * a, bounded * a) / 7
        if ratio * a <= bounded * a:  # else the clip holds it and nothing pulls
            slopes[i, j] = -current / behaviour * a / 7
    assert value == pytest.approx(total, rel=1e-12)
    np.testing.assert_allclose(gradient.reshape(2, 5), slopes, rtol=1e-12, atol=0)
    assert (slopes[:, :4] == 0).sum() > 1, "some rows are clipped, beside the one outside the mask"


def test_one_impossible_token_takes_its_sequence_with_it():
    old = OLD.copy()
    old[0, 2] = ROLLOUT[0, 2] - 10  # e^−10 < 1e-4
    batch, metrics = corrected(worked_batch(old), ("veto", {}))
    assert batch.segments.sequence_tokens.tolist() == [0, 3] and batch.segments.tokens == 3 and batch.segments.sequences == 1
    assert metrics["correction/0/tokens"] == pytest.approx(1 / 7) and metrics["correction/0/dropped"] == pytest.approx(4 / 7)
    old[0, 2] = ROLLOUT[0, 2] + 10  # too likely is no veto
    assert corrected(worked_batch(old), ("veto", {}))[0].segments.tokens == 7


@pytest.mark.parametrize("direction", [1, -1])
def test_k1_rejects_in_both_directions_and_k3_by_its_size(direction):
    """Row 0 is off by 0.2 on each token, row 1 not at all."""
    old = ROLLOUT + direction * np.array([[0.2], [0.0]])
    for options, left in (
        ({"statistic": "k1", "reduce": "mean", "threshold": 0.19}, 3),
        ({"statistic": "k1", "reduce": "mean", "threshold": 0.21}, 7),
        ({"statistic": "k1", "reduce": "sum", "threshold": 0.79}, 3),
        ({"statistic": "k1", "reduce": "sum", "threshold": 0.81}, 7),
        ({"statistic": "k2", "reduce": "sum", "threshold": 0.079}, 3),
        ({"statistic": "k2", "reduce": "max", "threshold": 0.021}, 7),
        ({"statistic": "k3", "reduce": "max", "threshold": math.exp(0.2 * direction) - 1 - 0.2 * direction - 1e-9}, 3),
        ({"statistic": "k3", "reduce": "max", "threshold": math.exp(0.2 * direction) - 1 - 0.2 * direction + 1e-9}, 7),
    ):
        assert corrected(worked_batch(old), ("reject", options))[0].segments.tokens == left, options


def test_off_policy_masking_keeps_good_examples_and_denominators():
    """Both sequences are off by 0.5 a token in the direction of "the trainer finds them less likely"; only row 1 has A < 0."""
    batch, metrics = corrected(worked_batch(ROLLOUT - 0.5), ("off_policy_mask", {"threshold": 0.4}))
    assert batch.segments.tokens == 7
    np.testing.assert_array_equal(batch.array("correction_weights").reshape(2, 5)[:, :3], [[1, 1, 1], [0, 0, 0]])
    assert metrics["correction/0/masked"] == pytest.approx(3 / 7)
    for other in (ROLLOUT - 0.3, ROLLOUT + 5.0):  # near enough; more likely than when sampled
        batch, _ = corrected(worked_batch(other), ("off_policy_mask", {"threshold": 0.4}))
        assert (batch.array("correction_weights") == 1).all()


def test_an_impossible_rollout_token_is_truncated_masked_or_refused_by_name():
    rollout = ROLLOUT.copy()
    rollout[1, 0] = -np.inf
    batch, _ = corrected(worked_batch(rollout=rollout), ("tis", {}))
    assert batch.array("correction_weights")[5] == 2
    batch, _ = corrected(worked_batch(rollout=rollout), ("icepop", {}))
    assert batch.array("correction_weights")[5] == 0
    assert corrected(worked_batch(rollout=rollout), ("mis", {}))[0].segments.tokens == 5  # and the one of 3.32
    batch, _ = corrected(worked_batch(rollout=rollout), ("sequence_mask_tis", {"low": 0.5, "high": 2.0}))
    assert batch.array("correction_weights").reshape(2, 5)[1, :3].tolist() == [0, 0, 0]
    for use, options in (
        ("reject", {"threshold": 100.0, "statistic": k, "reduce": r}) for k in ("k1", "k2", "k3") for r in ("sum", "mean", "max")
    ):
        assert corrected(worked_batch(rollout=rollout), (use, options))[0].segments.sequence_tokens.tolist() == [4, 0], options
    with pytest.raises(DataError, match=r"weight is inf for sample policy/g0/t1"):
        corrected(worked_batch(rollout=rollout), ("tis", {"high": INF}))


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("tis", {"low": 3.0}, "above high"),
        ("mis", {"high": 0.4}, "above high"),
        ("icepop", {"low": -0.1}, "low"),
        ("tis", {"high": math.nan}, "high"),
        ("tis", {"level": "trajectory"}, "level"),
        ("veto", {"threshold": 0.0}, "threshold"),
        ("veto", {"threshold": 1.0}, "threshold"),
        ("reject", {}, "threshold"),
        ("reject", {"threshold": 0.1, "statistic": "k4"}, "statistic"),
        ("off_policy_mask", {}, "threshold"),
        ("off_policy_mask", {"threshold": -1.0}, "threshold"),
    ],
)
def test_senseless_options_are_refused(use, options, message):
    with pytest.raises(ValidationError, match=message):
        built("ratio_correction", use, **options)


def test_an_open_bound_survives_the_resolved_configuration():
    """``config.yaml`` is written from the JSON form and read back."""
    yaml = pytest.importorskip("yaml")
    config = config_class("ratio_correction", "tis").model_validate({"use": "tis", "high": INF})
    again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert config_class("ratio_correction", "tis").model_validate(again) == config
