"""A prefix that branches share is trained once, with the mean of the branch advantages: the same as training the tree."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from fixtures import strategies
from fixtures.samples import answer, dpo_pair, random_samples, sample_id, two_branches
from hypothesis import given

from miles_core.batch import Batch
from miles_core.prefixes import common_prefix, mean_over_branches, row_owners, train_once
from miles_core.refs import SampleRef
from miles_core.sample import Sample


def pack(*samples: Sample) -> Batch:
    return Batch.of([SampleRef.of(s) for s in samples])


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_two_branches_by_hand() -> None:
    """Rows 0–4 are branch 0 (Q 1 10 11 12), rows 5–10 branch 1 (Q 1 10 11 20 21). Rows 5–7 predict 1, 10, 11: shared."""
    batch = pack(*two_branches())
    owners = row_owners(batch)
    assert owners is not None
    assert owners.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 8, 9, 10]
    once = train_once(batch, owners)
    assert once.array("loss_mask").tolist() == [False, True, True, True, False, False, False, False, True, True, False]
    assert once.segments.sequence_tokens.tolist() == [3, 2] and once.segments.trajectory_tokens.tolist() == [5, 5]
    assert (once.segments.tokens, once.segments.sequences, once.segments.trajectories) == (5, 2, 1)
    advantages = np.array([1.0] * 5 + [3.0] * 6, np.float32)
    averaged = mean_over_branches(advantages, owners)
    assert averaged.tolist() == [2, 2, 2, 1, 1, 2, 2, 2, 3, 3, 3] and averaged.dtype == np.float32


def test_three_branches_by_hand() -> None:
    """Branch 2 shares one token with both and two with branch 1: each row belongs to the earliest that has it."""

    def branch(index: int, tokens: list[int]) -> Sample:
        return answer(sample_id(0, index), [5], tokens, logprobs=[-0.5] * len(tokens))

    batch = pack(branch(0, [10, 11]), branch(1, [10, 20, 21]), branch(2, [10, 20, 22]))
    owners = row_owners(batch)
    assert owners is not None
    assert owners.tolist() == [0, 1, 2] + [0, 4, 5, 6] + [0, 4, 9, 10]
    averaged = mean_over_branches(np.repeat([3.0, 6.0, 12.0], [3, 4, 4]), owners)
    assert averaged.tolist() == [7, 3, 3] + [7, 9, 6, 6] + [7, 9, 12, 12]
    assert train_once(batch, owners).segments.tokens == 2 + 2 + 1


def test_branches_of_different_trajectories_share_nothing() -> None:
    """Two trajectories that happened to say the same are two draws."""
    first, second = two_branches()
    assert row_owners(pack(first, replace(second, id=sample_id(1)))) is None


def test_nothing_shared_is_none() -> None:
    assert row_owners(pack(answer(sample_id(0, 0), [5], [6]), answer(sample_id(0, 1), [7], [6]))) is None
    assert row_owners(pack(*two_branches()[:1])) is None


@pytest.mark.parametrize("change", ["token", "version", "logprob"])
def test_what_ends_a_common_prefix(change: str) -> None:
    first, second = two_branches()
    assert common_prefix(first, second) == 4
    column = {"token": second.tokens, "version": second.versions, "logprob": second.logprobs}[change]
    column[2] -= 1
    assert common_prefix(first, second) == common_prefix(second, first) == 2


def test_how_nan_is_written_does_not_matter() -> None:
    """A prompt's logprobs are NaN whichever NaN a sampler wrote; float64 logprobs compare as numbers too."""
    first, second = two_branches()
    second.logprobs[:2] = np.array([0xFFC00000, 0x7FC00123], np.uint32).view(np.float32)
    assert common_prefix(first, second) == 4
    for sample in (first, second):
        sample.columns["logprobs"] = sample.logprobs.astype(np.float64)
    assert common_prefix(first, second) == 4


def test_a_sample_that_was_filtered_out_owns_nothing() -> None:
    """Branch 0 is not trained, so branch 1 trains the prefix itself and its own advantage is not mixed."""
    first, second = two_branches()
    first.loss_mask[:] = False
    assert row_owners(pack(first, second)) is None


def test_a_token_that_only_one_branch_trains() -> None:
    """Branch 0 masks its first sampled token: row 6 of branch 1 keeps it; the next is shared as before."""
    first, second = two_branches()
    first.loss_mask[2] = False
    batch = pack(first, second)
    owners = row_owners(batch)
    assert owners is not None and owners.tolist() == [0, 1, 2, 3, 4, 0, 6, 2, 8, 9, 10]
    assert train_once(batch, owners).array("loss_mask").tolist()[5:] == [False, True, False, True, True, False]


def test_a_branch_that_is_all_prefix() -> None:
    """It trains nothing of its own, so it is no sequence of the step any more; its advantage counts in the mean."""
    first, second = two_branches()
    batch = pack(first, second.slice(0, 4))
    owners = row_owners(batch)
    assert owners is not None
    once = train_once(batch, owners)
    assert once.segments.sequence_tokens.tolist() == [3, 0] and (once.segments.sequences, once.segments.trajectories) == (1, 1)
    assert mean_over_branches(np.repeat([1.0, 3.0], [5, 4]), owners).tolist() == [2, 2, 2, 1, 1, 2, 2, 2, 3]


def test_pairs_are_not_branches() -> None:
    """DPO's two answers are two trajectories: both train their whole answer."""
    assert row_owners(pack(*dpo_pair())) is None


# ---- by property ----------------------------------------------------------------------------------------------------


def tree_gradient(batch: Batch, advantages: np.ndarray) -> dict[tuple, float]:
    """Reference: d(loss) / d(logprob of node) when each distinct trained node of the trajectories' trees counts once.

    A node is a trajectory and the path of (token, version, logprob) down to it; its advantage is the mean over the samples
    that pass through it and train it; loss = − Σ advantage · logprob / (number of trained nodes).
    """
    through: dict[tuple, list[float]] = defaultdict(list)
    for s, ref in enumerate(batch.refs):
        sample = ref.get()
        for t in range(1, len(sample)):
            if sample.loss_mask[t]:
                through[node(sample, t)].append(advantages[batch.cu_seqlens[s] + t - 1])
    return {n: -float(np.mean(a)) / len(through) for n, a in through.items()}


def node(sample: Sample, t: int) -> tuple:
    logprobs = [None if v < 0 else p for p, v in zip(sample.logprobs.tolist(), sample.versions.tolist(), strict=True)]
    path = tuple(zip(sample.tokens[: t + 1].tolist(), sample.versions[: t + 1].tolist(), logprobs[: t + 1], strict=True))
    return (sample.id.group, sample.id.trajectory, path)


@given(strategies.batches)
def test_training_once_is_training_the_tree(batch: Batch) -> None:
    """The token-mean policy gradient of the deduplicated batch, gathered by node, is the tree's; no node twice."""
    advantages = np.random.default_rng(0).normal(size=batch.n_rows)
    expected = tree_gradient(batch, advantages)
    owners = row_owners(batch)
    if owners is not None:
        batch, advantages = train_once(batch, owners), mean_over_branches(advantages, owners)
    found: dict[tuple, float] = {}
    for s, ref in enumerate(batch.refs):
        start = int(batch.cu_seqlens[s])
        for p in np.flatnonzero(batch.array("loss_mask")[start : start + ref.length]).tolist():
            name = node(ref.get(), p + 1)
            assert name not in found, "trained twice"
            found[name] = -advantages[start + p] / batch.segments.tokens
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[n] for n in expected], list(expected.values()), atol=1e-12)


def test_random_branches_do_share() -> None:
    """The property above is not vacuous."""
    shared = [row_owners(pack(*random_samples(seed))) for seed in range(20)]
    assert sum(o is not None and int((o != np.arange(len(o))).sum()) > 5 for o in shared) > 10
