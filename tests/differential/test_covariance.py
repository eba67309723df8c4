"""Selection of tokens by covariance (Clip-Cov, KL-Cov): the numbers, how many, and that nothing but the samples decides."""

from __future__ import annotations

import numpy as np
import pytest
from fixtures.losses import answers, config, pack
from fixtures.samples import random_samples
from hypothesis import given
from hypothesis import strategies as st

from miles_core.errors import DataError

pytest.importorskip("torch")


def with_columns(samples, numbers, old="old_logprobs"):
    """A batch with log-probabilities and advantages from ``numbers`` by (sample id, position), NaN where nothing is trained."""
    batch = pack(samples)
    rows = np.array([numbers[str(ref.id)][p] for ref in batch.refs for p in range(ref.length)])
    return batch.with_columns({old: np.where(batch.array("loss_mask"), rows[:, 0], np.nan), "advantages": rows[:, 1]})


def random_numbers(samples, seed, ties=False):
    rng = np.random.default_rng(seed)
    out = {}
    for sample in samples:
        logprobs, advantages = -rng.exponential(size=len(sample)), np.full(len(sample), rng.normal())
        out[str(sample.id)] = np.stack([logprobs.round(0) if ties else logprobs, advantages.round(0) if ties else advantages], 1)
    return out


def selected(loss, batch, seed=0):
    """Of each sample id the positions that were selected."""
    column = loss.columns_from(batch, seed)["high_covariance"]
    assert column.dtype == bool and not (column & ~batch.array("loss_mask")).any()
    return {str(r.id): np.flatnonzero(column[batch.rows_of([s])]).tolist() for s, r in enumerate(batch.refs)}


def loop_covariances(batch):
    """By row, from the definition."""
    trained = np.flatnonzero(batch.array("loss_mask"))
    logprobs, advantages = batch.array("old_logprobs"), batch.array("advantages")
    mean = [sum(x[p] for p in trained) / len(trained) for x in (logprobs, advantages)]
    return {p: (logprobs[p] - mean[0]) * (advantages[p] - mean[1]) for p in trained}


@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([1e-4, 0.1, 0.5, 1.0]))
def test_kl_cov_takes_the_highest(seed, fraction):
    samples = random_samples(seed)
    batch = with_columns(samples, random_numbers(samples, seed))
    column = config("loss", "kl_cov", fraction=fraction).columns_from(batch, 0)["high_covariance"]
    by_row = loop_covariances(batch) if batch.array("loss_mask").any() else {}
    count = min(max(int(fraction * len(by_row)), 1), len(by_row))
    assert set(np.flatnonzero(column)) == set(sorted(by_row, key=by_row.__getitem__)[len(by_row) - count :])


@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([1e-4, 0.05, 1.0]), low=st.sampled_from([-1.0, 0.1, 1.0]))
def test_clip_cov_draws_between_its_bounds(seed, fraction, low):
    samples = random_samples(seed)
    batch = with_columns(samples, random_numbers(samples, seed))
    column = config("loss", "clip_cov", fraction=fraction, low=low, high=3.0).columns_from(batch, 0)["high_covariance"]
    by_row = loop_covariances(batch) if batch.array("loss_mask").any() else {}
    candidates = {p for p, c in by_row.items() if low < c < 3.0}
    assert set(np.flatnonzero(column)) <= candidates
    assert column.sum() == min(max(int(fraction * len(by_row)), 1), len(candidates))


@pytest.mark.parametrize("options", [{"use": "kl_cov", "fraction": 0.2}, {"use": "clip_cov", "fraction": 0.2, "low": -0.5}])
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
def test_neither_the_order_of_samples_nor_ties_change_what_is_selected(options, seed, ties):
    """With rounded numbers whole runs of tokens tie; which of them are selected is the seed's, the sample's and the position's to say."""
    samples = random_samples(seed, groups=4)
    numbers, loss = random_numbers(samples, seed, ties), config("loss", **options)
    found = selected(loss, with_columns(samples, numbers))
    shuffled = [samples[i] for i in np.random.default_rng(seed).permutation(len(samples))]
    assert selected(loss, with_columns(shuffled, numbers)) == found


@pytest.mark.parametrize("use", ["kl_cov", "clip_cov"])
def test_among_equals_the_seed_decides(use):
    """Sixty tokens of probability 1 and the same advantage have one covariance; six of them are taken, and others with another seed."""
    samples = answers(6, list(range(20)))
    numbers = {str(s.id): np.stack([np.zeros(21), np.full(21, 1.0)], 1) for s in samples[:3]}
    numbers |= {str(s.id): np.stack([np.full(21, -4.0), np.full(21, -1.0)], 1) for s in samples[3:]}
    loss = config("loss", use, fraction=0.05)
    batch = with_columns(samples, numbers)
    taken = [selected(loss, batch, seed) for seed in range(4)]
    assert all(sum(map(len, t.values())) == 6 for t in taken) and len({str(t) for t in taken}) == 4
    if use == "clip_cov":  # both halves have covariance 2
        assert any(t[str(samples[5].id)] or t[str(samples[4].id)] or t[str(samples[3].id)] for t in taken)


def test_log_probabilities_of_the_rollout_where_the_ratio_starts_from_them():
    samples = answers(2, [1, 2, 3])
    numbers = random_numbers(samples, 0)
    by = {
        old: selected(config("loss", "kl_cov", old=old), with_columns(samples, numbers, name))
        for old, name in (("rollout", "logprobs"), ("recompute", "old_logprobs"))
    }
    assert by["rollout"] == by["recompute"] and sum(map(len, by["rollout"].values())) == 1


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("use", ["kl_cov", "clip_cov"])
def test_a_missing_log_probability_is_named(use, bad):
    samples = answers(2, [1, 2, 3])
    numbers = random_numbers(samples, 0)
    numbers[str(samples[1].id)][2, 0] = bad  # speaks of the last token
    with pytest.raises(DataError, match=rf"sample policy/g0/t1\.b0@0 has old_logprobs {bad}"):
        config("loss", use).columns_from(with_columns(samples, numbers), 0)


@pytest.mark.parametrize("use", ["kl_cov", "clip_cov"])
def test_nothing_is_selected_where_nothing_is_trained(use):
    samples = answers(2, [1, 2, 3])
    numbers = random_numbers(samples, 0)
    for sample in samples:
        sample.loss_mask[:] = False
    assert not any(selected(config("loss", use), with_columns(samples, numbers)).values())
