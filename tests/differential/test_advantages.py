"""Advantages against the golden values of the algorithm notes and NumPy loops written from the papers' formulas, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
from fixtures.samples import answer, random_samples, sample_id
from fixtures.strategies import samples as ragged
from hypothesis import given
from hypothesis import strategies as st

from miles_core.batch import Batch
from miles_core.errors import DataError
from miles_core.plugins import config_class
from miles_core.protocols import AdvantageInputs, BuildContext
from miles_core.refs import SampleRef

torch = pytest.importorskip("torch")

SEQUENCE_LEVEL = ["grpo", "dr_grpo", "rloo", "maxrl", "opo", "pass_at_k", "gdpo", "preference"]
TOKEN_LEVEL = ["reinforce_pp", "reinforce_pp_baseline", "gae", "opd"]
OPTIONS = {"dr_grpo": {"use": "grpo", "scale": "none"}, "pass_at_k": {"use": "pass_at_k", "k": 2}}
factors = st.sampled_from([0.0, 1e-8, 0.5, 0.95, 1.0]) | st.floats(0, 1)


def config(use, **options):
    return config_class("advantage", use).model_validate({"use": use, **options})


def built(use, **options):
    """The function a recipe would get."""
    return config(**({"use": use} | OPTIONS.get(use, {}) | options)).build(BuildContext(None, "advantages", 0))


def batch_of(samples):
    return Batch.of([SampleRef.of(s) for s in samples])


def inputs_of(batch, *, token_rewards=None, parts=None, weights=None, **columns):
    """What the loop would give; arrays as tensors."""
    from miles_core.algorithms.segments import SegmentOps

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x))

    return AdvantageInputs(
        rewards=tensor(batch.rewards),
        columns={n: tensor(c) for n, c in (batch.columns | columns).items() if isinstance(c, np.ndarray)},
        ops=SegmentOps.of(batch),
        parts={n: tensor(p) for n, p in (parts or {}).items()},
        weights=weights or {},
        token_rewards=None if token_rewards is None else tensor(token_rewards),
    )


def by_sample(batch, rows):
    """One number a sample from a column that must hold the same on all of its rows."""
    rows = rows.numpy()
    assert rows.dtype == np.float64 and len(rows) == batch.n_rows
    bounds = zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    assert all((rows[s:e] == rows[s]).all() for s, e in bounds)
    return rows[batch.cu_seqlens[:-1]]


def with_rewards(samples, function):
    return [replace(s, reward=float(function(s.reward))) for s in samples]


def fitting(use, samples):
    """The same samples with rewards that the advantage takes."""
    if use == "pass_at_k":
        return with_rewards(samples, lambda r: r > 0)
    return with_rewards(samples, abs) if use == "maxrl" else samples


def everything(batch, seed, **more):
    """Inputs with every column an advantage may ask for; NaN outside the mask. Parts: the reward is 2a + 0.5b + environment."""
    rng, mask = np.random.default_rng(seed), batch.array("loss_mask")
    columns = {n: np.where(mask, rng.normal(size=batch.n_rows), np.nan) for n in ("values", "teacher_logprobs")}
    a, b = (rng.integers(-1, 3, batch.segments.trajectory.max() + 1)[batch.segments.trajectory].astype(float) for _ in range(2))
    parts = {"a": a, "b": b, "environment": batch.rewards - 2 * a - 0.5 * b}
    return inputs_of(batch, parts=parts, weights={"environment": 1.0, "a": 2.0, "b": 0.5}, **columns | more)


# ---- golden values -------------------------------------------------------------------------------------------------------

REWARDS = [1.0, 0.0, 1.0, 0.0, 0.5, 0.5]  # two groups of three


@pytest.mark.parametrize(
    ("use", "golden"),
    [
        ("grpo", [0.577349, -1.154699, 0.577349, -1.154697, 0.577348, 0.577348]),
        ("dr_grpo", [1 / 3, -2 / 3, 1 / 3, -1 / 3, 1 / 6, 1 / 6]),
        ("rloo", [0.5, -1, 0.5, -0.5, 0.25, 0.25]),
        ("reinforce_pp_baseline", [0.869227, -1.738454, 0.869227, -0.869227, 0.434613, 0.434613]),
    ],
)
def test_golden_values(use, golden):
    samples = [answer(sample_id(i % 3, group=f"g{i // 3}"), [5], [10, 11, 12], reward=r) for i, r in enumerate(REWARDS)]
    rows = built(use)(inputs_of(batch_of(samples))).numpy().reshape(6, 4)[:, :3]
    np.testing.assert_allclose(rows, np.repeat(np.array(golden)[:, None], 3, axis=1), atol=6e-7)


# ---- one number a trajectory, against the formulas -------------------------------------------------------------------------


def grouped(samples, penalties):
    """(reward + sum of its rows' penalties, trained tokens) of each trajectory, by group and trajectory; each trajectory once."""
    found: dict[str, dict[int, list]] = {}
    for sample, penalty in zip(samples, penalties, strict=True):
        entry = found.setdefault(sample.id.group, {}).setdefault(sample.id.trajectory, [sample.reward, 0])
        entry[0] += penalty
        entry[1] += int(sample.loss_mask[1:].sum())
    return found


def of_group(use, rewards, lengths):
    """The paper's formula for one group of trajectories, as plain Python."""
    n = len(rewards)
    mean = sum(rewards) / n
    if use == "preference":
        whole = [(r, -i) for i, (r, length) in enumerate(zip(rewards, lengths, strict=True)) if length]
        best, worst = (max(whole, default=(0, 0)), max([(-r, i) for r, i in whole], default=(0, 0)))
        return [(best[0] + worst[0] > 0) * (float(i == -best[1]) - float(i == -worst[1])) for i in range(n)]
    if len(set(rewards)) == 1:
        return [0.0] * n
    if use == "grpo":
        return [(r - mean) / (np.std(rewards, ddof=1) + 1e-6) for r in rewards]
    if use == "dr_grpo":
        return [r - mean for r in rewards]
    if use == "rloo":
        return [r - sum(rewards[:i] + rewards[i + 1 :]) / (n - 1) for i, r in enumerate(rewards)]
    if use == "maxrl":
        return [(r - mean) / mean for r in rewards]
    assert use == "opo"
    weights = [length / max(sum(lengths), 1) for length in lengths]
    return [r - sum(w * x for w, x in zip(weights, rewards, strict=True)) for r in rewards]


@pytest.mark.parametrize("use", ["grpo", "dr_grpo", "rloo", "maxrl", "opo", "preference"])
@given(samples=ragged, seed=st.integers(0, 1000), penalised=st.booleans())
def test_every_trajectory_counts_once_in_ragged_batches(use, samples, seed, penalised):
    """Groups of one to three trajectories of one to three samples, in any order, some equal, some untrained, some with a KL penalty."""
    rng = np.random.default_rng(seed)
    samples = fitting(use, samples)
    rng.shuffle(samples)  # nothing may depend on samples standing together
    batch = batch_of(samples)
    mask = batch.array("loss_mask")
    penalty = np.where(mask, rng.random(batch.n_rows), np.nan) if penalised else np.zeros(batch.n_rows)
    sums = [np.nansum(penalty[s:e][mask[s:e]]) for s, e in itertools.pairwise(batch.cu_seqlens)]
    expected = {}
    for group, trajectories in grouped(samples, sums).items():
        rewards, lengths = [t[0] for t in trajectories.values()], [t[1] for t in trajectories.values()]
        expected |= {(group, t): a for t, a in zip(trajectories, of_group(use, rewards, lengths), strict=True)}
    found = by_sample(batch, built(use)(inputs_of(batch, token_rewards=penalty if penalised else None)))
    np.testing.assert_allclose(found, [expected[s.id.group, s.id.trajectory] for s in samples], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use", SEQUENCE_LEVEL)
def test_a_group_of_one_and_a_group_of_equals_have_advantage_zero(use):
    reward = 1.0 if use == "pass_at_k" else 0.7  # 0.7 · 7 / 7 is not 0.7 in floating point
    one = [answer(sample_id(0, group="one"), [5], [10], reward=reward)]
    equal = [answer(sample_id(t, group="equal"), [5], [10] * (t + 1), reward=reward) for t in range(7)]
    unequal = [answer(sample_id(t, group="unequal"), [5], [10], reward=float(t == 2)) for t in range(3)]
    batch = batch_of(one + equal + unequal)
    inputs = inputs_of(batch, parts={"a": batch.rewards, "b": batch.rewards}, weights={"a": 0.5, "b": 0.5})
    found = by_sample(batch, built(use)(inputs))
    assert (found[:8] == 0).all() and found[10] > 0


@given(right=st.lists(st.booleans(), min_size=1, max_size=7), k=st.integers(1, 8))
def test_pass_at_k_is_the_mean_over_all_sets_of_k(right, k):
    """Every set of k trajectories earns the best of its rewards, less the mean over all sets, by their deviation."""
    samples = [answer(sample_id(t), [5], [10], reward=float(r)) for t, r in enumerate(right)]
    batch = batch_of(samples)
    found = by_sample(batch, built("pass_at_k", k=k)(inputs_of(batch)))
    sets = list(itertools.combinations(range(len(right)), k))
    earned = np.array([any(right[i] for i in s) for s in sets], float)
    if not sets or earned.std() == 0:
        assert (found == 0).all()
        return
    scaled = (earned - earned.mean()) / earned.std()
    expected = [np.mean([a for a, s in zip(scaled, sets, strict=True) if i in s]) for i in range(len(right))]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_maxrl_takes_the_worked_example_of_one_success_in_four():
    batch = batch_of([answer(sample_id(t), [5], [10], reward=float(t == 0)) for t in range(4)])
    assert by_sample(batch, built("maxrl")(inputs_of(batch))).tolist() == [3.0, -1.0, -1.0, -1.0]


@given(samples=ragged, seed=st.integers(0, 1000), weights=st.tuples(st.floats(0, 2), st.floats(-2, 2)))
def test_gdpo_normalises_each_part_in_its_group_and_the_sum_in_the_batch(samples, seed, weights):
    rng = np.random.default_rng(seed)
    keys = [(s.id.group, s.id.trajectory) for s in samples]
    parts = {key: rng.integers(-2, 3, 2).astype(float) for key in keys}
    samples = [replace(s, reward=float(parts[k] @ weights)) for s, k in zip(samples, keys, strict=True)]
    total = dict.fromkeys(parts, 0.0)
    for j, weight in enumerate(weights):
        for key in parts:
            group = [parts[k][j] for k in parts if k[0] == key[0]]
            deviation = np.std(group, ddof=1) if len(group) > 1 else 0.0
            total[key] += weight * (parts[key][j] - np.mean(group)) / (deviation + 1e-6)
    values = np.array(list(total.values()))
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    expected = [(total[k] - values.mean()) / (spread + 1e-6) for k in keys]

    batch = batch_of(samples)
    columns = {f"part{j}": np.array([parts[k][j] for k in keys]) for j in range(2)}
    # A part that does not count, and the environment's weight without an environment, change nothing.
    given_weights = {"environment": 1.0, "part0": weights[0], "part1": weights[1]}
    inputs = inputs_of(batch, parts=columns | {"only_reported": batch.rewards}, weights=given_weights)
    np.testing.assert_allclose(by_sample(batch, built("gdpo")(inputs)), expected, rtol=1e-6, atol=1e-8)


def test_gdpo_tells_mixtures_apart_that_have_the_same_sum():
    """The paper's reason to be: (0, 1) against (0, 0), and (1, 1) against (0, 0), are the same to GRPO."""
    rewards = {"easy": [(0, 1), (0, 0)], "hard": [(1, 1), (0, 0)]}
    samples = [answer(sample_id(t, group=g), [5], [10], reward=float(sum(r))) for g, rs in rewards.items() for t, r in enumerate(rs)]
    batch = batch_of(samples)
    parts = {n: np.array([float(r[j]) for rs in rewards.values() for r in rs]) for j, n in enumerate("ab")}
    inputs = inputs_of(batch, parts=parts, weights={"a": 1.0, "b": 1.0})
    alike, apart = by_sample(batch, built("grpo")(inputs)), by_sample(batch, built("gdpo")(inputs))
    assert alike[2] == pytest.approx(alike[0], abs=1e-5)
    assert apart[2] == pytest.approx(2 * apart[0], rel=1e-6)


def test_preference_takes_the_first_of_equals_and_only_one_of_each():
    rewards = [1.0, 3.0, 0.0, 3.0, 0.0]
    batch = batch_of([answer(sample_id(t), [5], [10], reward=r) for t, r in enumerate(rewards)])
    assert by_sample(batch, built("preference")(inputs_of(batch))).tolist() == [0.0, 1.0, -1.0, 0.0, 0.0]


# ---- by token ------------------------------------------------------------------------------------------------------------


def loop_gae(batch, rewards, token_rewards, values, gamma, lam):
    """(advantages, returns) [N]: one row after another from the end of each sample, rows outside the mask passed over."""
    mask = batch.array("loss_mask")
    advantages, returns = np.zeros(batch.n_rows), np.zeros(batch.n_rows)
    for s, (start, end) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        value, advantage, reward = 0.0, 0.0, rewards[s]
        for row in range(end - 1, start - 1, -1):
            if not mask[row]:
                continue
            error = reward + token_rewards[row] + gamma * value - values[row]
            advantage = error + gamma * lam * advantage
            value, reward = values[row], 0.0
            advantages[row], returns[row] = advantage, advantage + value
    return advantages, returns


def loop_whiten(x, mask):
    """Mean 0 and variance 1 over the trained rows, n − 1 in the variance, 1e-8 added to it."""
    if not mask.any():
        return np.zeros_like(x)
    variance = np.var(x[mask], ddof=1) if mask.sum() > 1 else 0.0
    return np.where(mask, (x - x[mask].mean()) / np.sqrt(variance + 1e-8), 0.0)


@given(
    samples=ragged,
    seed=st.integers(0, 1000),
    gamma=factors,
    lam=factors,
    penalised=st.booleans(),
    whiten=st.booleans(),
    chunk=st.sampled_from([2, 3, 32]),
    block=st.sampled_from([1, 30, 1 << 17]),
)
def test_gae_is_the_loop_over_the_trained_tokens_of_each_sample(samples, seed, gamma, lam, penalised, whiten, chunk, block):
    """With injected tokens inside, branches, untrained samples; NaN on every row that is no step; however the work is cut up."""
    rng = np.random.default_rng(seed)
    rng.shuffle(samples)
    batch = batch_of(samples)
    mask = batch.array("loss_mask")
    values, penalty = (np.where(mask, rng.normal(size=batch.n_rows), np.nan) for _ in range(2))
    inputs = inputs_of(batch, values=values, token_rewards=penalty if penalised else None)
    with patch.multiple("miles_core.algorithms.gae", CHUNK=chunk, BLOCK=block):
        columns = built("gae", gamma=gamma, lam=lam, whiten=whiten)(inputs)
    advantages, returns = loop_gae(batch, batch.rewards, penalty if penalised else np.zeros(batch.n_rows), values, gamma, lam)
    assert columns.keys() == {"advantages", "returns"} == config("gae").provided()
    np.testing.assert_allclose(columns["returns"], returns, atol=1e-10)
    np.testing.assert_allclose(columns["advantages"], loop_whiten(advantages, mask) if whiten else advantages, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_of_long_samples_is_the_loop(gamma, lam):
    """Lengths around the ends of chunks, of chunks of chunks, and beyond; a fifth of the tokens injected."""
    rng = np.random.default_rng(0)
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 40000, 3000, 70000, 30000]  # more than a block
    samples = [answer(sample_id(t), [5], [10] * n, logprobs=[-1.0] * n, reward=rng.normal()) for t, n in enumerate(lengths)]
    for sample in samples[::2]:
        sample.loss_mask[1:] &= rng.random(len(sample) - 1) < 0.8
    batch = batch_of(samples)
    values = rng.normal(size=batch.n_rows)
    columns = built("gae", gamma=gamma, lam=lam, whiten=False)(inputs_of(batch, values=values))
    advantages, returns = loop_gae(batch, batch.rewards, np.zeros(batch.n_rows), values, gamma, lam)
    np.testing.assert_allclose(columns["advantages"], advantages, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(columns["returns"], returns, rtol=1e-10, atol=1e-10)


def test_gae_without_decay_or_without_memory_is_exact():
    """Sums of whole numbers: with γ = λ = 1 the return of every step is the reward; with γ = 0 the advantage is r − V of the step."""
    samples = [answer(sample_id(t), [5], [10] * n, logprobs=[-1.0] * n, reward=float(n)) for t, n in enumerate([1, 40, 5000])]
    batch = batch_of(samples)
    mask, values = batch.array("loss_mask"), np.random.default_rng(0).integers(-5, 6, batch.n_rows).astype("float32")
    patient = built("gae", whiten=False)(inputs_of(batch, values=values))
    np.testing.assert_array_equal(patient["returns"], np.where(mask, np.repeat(batch.rewards, batch.lengths), 0.0))
    hasty = built("gae", gamma=0.0, whiten=False)(inputs_of(batch, values=values))
    last = np.append(~mask[1:], True) & mask
    np.testing.assert_array_equal(hasty["returns"], np.where(last, np.repeat(batch.rewards, batch.lengths), 0.0))
    np.testing.assert_array_equal(hasty["advantages"], np.where(mask, hasty["returns"].numpy() - values, 0.0))


@pytest.mark.parametrize("use", ["reinforce_pp", "reinforce_pp_baseline"])
@given(samples=ragged, seed=st.integers(0, 1000), gamma=factors, penalised=st.booleans())
def test_reinforce_pp_whitens_the_discounted_returns_of_the_batch(use, samples, seed, gamma, penalised):
    rng = np.random.default_rng(seed)
    rng.shuffle(samples)
    batch = batch_of(samples)
    mask = batch.array("loss_mask")
    penalty = np.where(mask, rng.normal(size=batch.n_rows), np.nan)
    rewards = batch.rewards
    if use == "reinforce_pp_baseline":
        groups = grouped(samples, np.zeros(len(samples)))
        rewards = np.array([s.reward - np.mean([t[0] for t in groups[s.id.group].values()]) for s in samples])
    nothing = np.zeros(batch.n_rows)
    returns, _ = loop_gae(batch, rewards, penalty if penalised else nothing, nothing, gamma, 1.0)
    found = built(use, gamma=gamma)(inputs_of(batch, token_rewards=penalty if penalised else None))
    np.testing.assert_allclose(found, loop_whiten(returns, mask), rtol=1e-8, atol=1e-8)


def test_whitened_returns_that_are_all_equal_are_zero():
    batch = batch_of([answer(sample_id(t), [5], [10] * (t + 1), reward=0.7) for t in range(5)])
    np.testing.assert_allclose(built("reinforce_pp")(inputs_of(batch)), 0.0, atol=1e-10)


@pytest.mark.parametrize("base", [None, "grpo", "gae", "reinforce_pp"])
@pytest.mark.parametrize("seed", range(5))
def test_opd_is_its_base_less_the_log_ratio_of_student_and_teacher(base, seed):
    batch = batch_of(random_samples(seed, groups=4))
    mask = batch.array("loss_mask")
    inputs = everything(batch, seed, token_rewards=np.where(mask, 0.25, np.nan))
    found = built("opd", coefficient=0.5, **({"base": base} if base else {}))(inputs)
    below = {"advantages": torch.full(mask.shape, 0.25)} if base is None else built(base)(inputs)
    below = below if isinstance(below, dict) else {"advantages": below}
    expected = below["advantages"].numpy() - 0.5 * (batch.array("logprobs") - inputs.columns["teacher_logprobs"].numpy())
    np.testing.assert_allclose(found["advantages"], np.where(mask, expected, 0.0), rtol=1e-12)
    assert found.keys() == below.keys()
    assert base is None or found.keys() == config("opd", base=base).provided()
    assert base != "gae" or (found["returns"] == below["returns"]).all()


def test_opd_without_base_and_penalty_is_the_log_ratio_alone():
    batch = batch_of([answer(sample_id(), [5], [10, 11], logprobs=[-1.0, -2.0])])
    found = built("opd")(inputs_of(batch, teacher_logprobs=np.array([-0.5, -4.0, np.nan])))
    assert found["advantages"].tolist() == [0.5, -2.0, 0.0]


# ---- what holds for all of them --------------------------------------------------------------------------------------------


def advantages_of(use, inputs):
    given = built(use)(inputs)
    return given if isinstance(given, dict) else {"advantages": given}


@pytest.mark.parametrize("use", SEQUENCE_LEVEL + TOKEN_LEVEL)
@pytest.mark.parametrize("seed", range(3))
def test_what_stands_on_masked_rows_never_leaks(use, seed):
    batch = batch_of(fitting(use, random_samples(seed, groups=4)))
    mask = batch.array("loss_mask")
    plain = everything(batch, seed)
    found = []
    for filler in (np.nan, np.inf, -np.inf, 0.0, 1e30):
        columns = {n: c.where(torch.from_numpy(mask), filler) if c.is_floating_point() else c for n, c in plain.columns.items()}
        penalty = None if use in ("maxrl", "pass_at_k", "gdpo") else torch.from_numpy(np.where(mask, 0.1, filler))
        found.append(advantages_of(use, replace(plain, columns=columns, token_rewards=penalty)))
    for columns in found:
        for name, column in columns.items():
            assert column.isfinite().all()
            np.testing.assert_array_equal(column, found[0][name])


@pytest.mark.parametrize("use", SEQUENCE_LEVEL + TOKEN_LEVEL)
def test_a_batch_without_a_trained_token_is_finite_and_of_the_right_shape(use):
    samples = [answer(sample_id(t), [5], [10, 11], reward=float(t)) for t in range(2)]
    for sample in samples:
        sample.loss_mask[:] = False
    inputs = everything(batch_of(samples), 0)
    for column in advantages_of(use, inputs).values():
        assert column.shape == (6,) and column.isfinite().all()
        assert use in SEQUENCE_LEVEL or (column == 0).all()


@pytest.mark.parametrize("use", SEQUENCE_LEVEL + TOKEN_LEVEL)
def test_a_filtered_trajectory_keeps_counting_and_an_empty_answer_does_no_harm(use):
    """Rewards of trajectories without trained tokens stay in the statistics; where lengths count they have none."""
    rewards = [1.0, 0.0, 0.0, 1.0]
    samples = [answer(sample_id(t), [5, 6], [10] * (3 * (t > 0)), reward=r) for t, r in enumerate(rewards)]
    samples[1].loss_mask[:] = False
    batch = batch_of(samples)
    found = advantages_of(use, everything(batch, 0))["advantages"]
    assert found.isfinite().all()
    assert found[torch.from_numpy(batch.array("loss_mask"))].all()
    if use == "grpo":
        np.testing.assert_allclose(by_sample(batch, found), np.array([1, -1, -1, 1]) * 0.5 / (np.sqrt(1 / 3) + 1e-6))
    if use == "preference":  # the pair is of those that are trained
        assert by_sample(batch, found).tolist() == [0.0, 0.0, -1.0, 1.0]
    if use == "opo":  # lengths 0, 0, 3, 3
        np.testing.assert_allclose(by_sample(batch, found), [0.5, -0.5, -0.5, 0.5])


@pytest.mark.parametrize("use", [u for u in SEQUENCE_LEVEL + TOKEN_LEVEL if u != "preference"])  # which takes the first of equals
@given(samples=ragged, seed=st.integers(0, 1000))
def test_the_order_of_samples_is_of_no_account(use, samples, seed):
    samples = fitting(use, samples)
    batch = batch_of(samples)
    inputs = everything(batch, seed)
    order = np.random.default_rng(seed).permutation(len(samples))
    rows = torch.from_numpy(batch.rows_of(order))
    other = inputs_of(
        batch_of([samples[s] for s in order]),
        parts={n: p[order] for n, p in inputs.parts.items()},
        weights=inputs.weights,
        **{n: c[rows].numpy() for n, c in inputs.columns.items()},
    )
    for name, column in advantages_of(use, inputs).items():
        np.testing.assert_allclose(advantages_of(use, other)[name], column[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use", SEQUENCE_LEVEL + TOKEN_LEVEL)
def test_only_those_that_say_so_vary_by_token(use):
    batch = batch_of([answer(sample_id(t), [5], [10, 11, 12], reward=float(t)) for t in range(2)])
    penalty = None if use in ("maxrl", "pass_at_k", "gdpo") else np.arange(8.0)
    rows = advantages_of(use, replace(everything(batch, 0), token_rewards=None if penalty is None else torch.from_numpy(penalty)))
    steps = rows["advantages"].numpy().reshape(2, 4)[:, :3]
    assert (steps != steps[:, :1]).any() == config(**{"use": use} | OPTIONS.get(use, {})).varies() == (use in TOKEN_LEVEL)


def test_the_loop_gets_single_precision_columns_and_an_infinite_one_is_named():
    from miles_core.algorithms.credit import advantage_columns

    samples = [answer(sample_id(t), [5], [10, 11], reward=float(t)) for t in range(2)]
    batch = batch_of(samples).with_columns({"values": np.zeros(6, "float32"), "teacher_logprobs": np.full(6, -1.0, "float32")})
    added = advantage_columns(batch, built("gae", whiten=False), {}, None, {})
    assert {n: (c.dtype.name, c.tolist()) for n, c in added.items()} == dict.fromkeys(
        ("advantages", "returns"), ("float32", [0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    )
    batch.array("teacher_logprobs")[4] = -np.inf
    with pytest.raises(DataError, match=r"the advantage's 'advantages' is -inf for sample policy/g0/t1"):
        advantage_columns(batch, built("opd"), {}, None, {})


# ---- what is refused -----------------------------------------------------------------------------------------------------


def test_rewards_that_do_not_fit_are_named():
    batch = batch_of([answer(sample_id(t), [5], [10], reward=r) for t, r in enumerate([1.0, 0.5, -2.0])])
    with pytest.raises(DataError, match=r"pass_at_k counts right and wrong answers, so rewards are 0 or 1; found 0\.5"):
        built("pass_at_k")(inputs_of(batch))
    with pytest.raises(DataError, match=r"maxrl divides by the mean reward, so rewards are 0 or above; found -2\.0"):
        built("maxrl")(inputs_of(batch))


def test_gdpo_names_a_part_that_is_missing():
    batch = batch_of([answer(sample_id(t), [5], [10], reward=float(t)) for t in range(2)])
    weights = {"environment": 1.0, "right": 1.0, "short": 0.5}
    with pytest.raises(DataError, match=r"some sample has no 'right'"):
        built("gdpo")(inputs_of(batch, parts={"short": batch.rewards}, weights=weights))
    # Nothing tells a missing environment from none but the sum.
    with pytest.raises(DataError, match=r"the parts right, short do not add up to the reward"):
        built("gdpo")(inputs_of(batch, parts={"right": batch.rewards, "short": batch.rewards}, weights=weights))
    with pytest.raises(DataError, match=r"a KL penalty is none of them"):
        built("gdpo")(inputs_of(batch, parts={"right": batch.rewards}, weights={"right": 1.0}, token_rewards=np.zeros(4)))


def test_what_each_needs_and_gives_is_declared():
    needs = {
        "grpo": {"rewards", "groups"},
        "rloo": {"rewards", "groups"},
        "reinforce_pp": {"rewards"},
        "reinforce_pp_baseline": {"rewards", "groups"},
        "gae": {"rewards", "values"},
        "maxrl": {"rewards", "groups"},
        "opo": {"rewards", "groups"},
        "gdpo": {"rewards", "groups"},
        "opd": {"logprobs", "teacher_logprobs"},
        "preference": {"rewards", "pairs"},
    }
    assert {use: config(use).required() for use in needs} == needs
    assert config("pass_at_k", k=1).required() == {"rewards", "groups"}
    nested = config("opd", base={"use": "gae", "lam": 0.5})
    assert nested.required() == {"logprobs", "teacher_logprobs", "rewards", "values"}
    assert nested.provided() == {"advantages", "returns"}
    assert config("rloo").provided() == config("opd").provided() == {"advantages"}


@pytest.mark.parametrize(
    ("use", "options"),
    [("gae", {"gamma": 1.1}), ("gae", {"lam": -0.1}), ("pass_at_k", {"k": 0}), ("pass_at_k", {}), ("opd", {"coefficient": 0.0})],
)
def test_options_out_of_range_are_refused(use, options):
    with pytest.raises(ValueError):
        config(use, **options)


def test_a_kl_penalty_in_the_reward_is_refused_where_it_makes_no_sense():
    def problems(advantage, kl_reward, whole=None):
        models = {"policy": SimpleNamespace(advantage=whole or advantage, kl_reward=kl_reward)}
        models["other"] = SimpleNamespace(advantage=config("grpo"), kl_reward=object())
        models["reference"] = SimpleNamespace(advantage=None, kl_reward=None)
        return advantage.problems(SimpleNamespace(models=models, rollout=SimpleNamespace(group_size=3)))

    for use in ("maxrl", "gdpo", "pass_at_k"):
        own = config(**{"use": use} | OPTIONS.get(use, {}))
        assert problems(own, None) == []
        assert "put a kl term into the losses" in problems(own, object())[0]
        distilled = config("opd", base=own)
        assert "put a kl term into the losses" in problems(distilled.base, object(), distilled)[0]
    assert problems(config("grpo"), object()) == []
    assert problems(config("pass_at_k", k=3), None) == []
    assert problems(config("pass_at_k", k=4), None) == ["k is 4, but groups have 3 trajectories; lower k or raise the rollout's group_size"]
