"""Group and sample filters, and the overlong penalty: what they keep, what they drop and why."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from fixtures.samples import answer, random_samples, sample_id, tool_turn, truncated, two_policies
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from miles_core.errors import DataError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext
from miles_core.sample import Group, Sample, Status


def built(point, use, **options):
    """The function a recipe would get."""
    return config_class(point, use).model_validate({"use": use, **options}).build(BuildContext(None, "filters", 0))


def group_of(*rewards):
    return Group("g0", [answer(sample_id(t), [5], [10], reward=r) for t, r in enumerate(rewards)])


@pytest.mark.parametrize(
    ("use", "options", "rewards", "reason"),
    [
        ("zero_variance", {}, [0.7, 0.7, 0.7], "all rewards are the same"),
        ("zero_variance", {}, [0.7], "all rewards are the same"),
        ("zero_variance", {}, [0.7, 0.7, 0.7000001], None),
        ("zero_variance", {"threshold": 0.25}, [0.5, 0.75], "all rewards are the same"),
        ("zero_variance", {"threshold": 0.25}, [0.5, 0.7500001], None),
        ("all_correct", {}, [1.0, 1.5], "all rewards are at least 1"),
        ("all_correct", {}, [1.0, 0.999], None),
        ("all_correct", {"threshold": 0.5}, [1.0, 0.5], "all rewards are at least 0.5"),
        ("all_wrong", {}, [0.0, -1.0], "all rewards are at most 0"),
        ("all_wrong", {}, [0.0, 0.001], None),
        ("all_wrong", {"threshold": 0.5}, [0.5, 0.0], "all rewards are at most 0.5"),
    ],
)
def test_group_filters_say_why_they_drop(use, options, rewards, reason):
    assert built("group_filter", use, **options)(group_of(*rewards)) == reason


@pytest.mark.parametrize("use", ["zero_variance", "all_correct", "all_wrong"])
def test_a_group_without_rewards_is_an_error_that_names_a_sample(use):
    with pytest.raises(DataError, match=r"trajectory of sample policy/g0/t0.*expected one reward, found none"):
        built("group_filter", use)(group_of(None, None))


def test_a_group_of_several_policies_is_kept_while_one_of_them_can_learn():
    """Doctor 1, patient −1 in every episode: no policy's rewards differ, though the two policies' do."""
    episodes = [two_policies(), two_policies()]
    for t, episode in enumerate(episodes):
        for sample in episode:
            sample.id = sample_id(t, policy=sample.id.policy)
    group = Group("g0", [s for episode in episodes for s in episode])
    assert built("group_filter", "zero_variance")(group) == "all rewards are the same"
    assert built("group_filter", "all_correct")(group) is built("group_filter", "all_wrong")(group) is None
    episodes[1][1].reward = 0.0
    assert built("group_filter", "zero_variance")(group) is None


@given(seed=st.integers(0, 2**32 - 1), threshold=st.integers(0, 4))
def test_several_samples_of_a_trajectory_are_one_reward(seed, threshold):
    group = Group("g0", random_samples(seed, groups=1))
    rewards = {s.id.trajectory: s.reward for s in group.samples}.values()
    dropped = built("group_filter", "zero_variance", threshold=threshold)(group) is not None
    assert dropped == (np.ptp(list(rewards)) <= threshold)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"min_tokens": 5, "max_tokens": 5}, None),
        ({"min_tokens": 6}, "fewer than 6 sampled tokens"),
        ({"max_tokens": 4}, "more than 4 sampled tokens"),
        ({"max_tokens": 0}, "more than 0 sampled tokens"),
    ],
)
def test_length_counts_sampled_tokens_only(options, reason):
    assert built("sample_filter", "length", **options)(tool_turn()[0]) == reason  # nine tokens, five of them sampled


def test_status_drops_the_truncated_or_what_it_is_told():
    cut, whole = truncated()[0], tool_turn()[0]
    assert built("sample_filter", "status")(cut) == "it is truncated"
    assert built("sample_filter", "status")(whole) is None
    assert built("sample_filter", "status", drop=["completed"])(whole) == "it is completed"
    assert built("sample_filter", "status", drop=["completed"])(cut) is None
    assert built("sample_filter", "status", drop=["aborted"])(answer(sample_id(), [5], [1], status=Status.ABORTED)) == "it is aborted"


def ngrams(sample, n):
    """Every run of n sampled tokens."""
    ends = range(n, len(sample) + 1)
    return [tuple(sample.tokens[e - n : e].tolist()) for e in ends if (sample.versions[e - n : e] >= 0).all()]


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 6), threshold=st.sampled_from([0.0, 0.2, 0.5, 0.8]))
def test_repetition_is_the_share_of_ngrams_that_came_before(seed, n, threshold):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 40))
    versions = np.where(rng.random(length) < 0.9, 3, -1)
    sample = Sample.of(sample_id(), rng.integers(0, 3, length), versions=versions)
    grams = ngrams(sample, n)
    share = 1 - len(set(grams)) / len(grams) if grams else 0.0
    reason = built("sample_filter", "repetition", ngram=n, threshold=threshold)(sample)
    assert reason == (f"{share:.0%} of its {n}-grams are repeated" if share > threshold else None)


def test_repetition_looks_past_prompts_and_tool_results():
    loop = answer(sample_id(), [5], [10, 11] * 20)
    assert built("sample_filter", "repetition")(loop) == "94% of its 8-grams are repeated"  # 33 of them, 2 different
    assert built("sample_filter", "repetition")(answer(sample_id(), [7] * 60, [10, 11])) is None
    assert built("sample_filter", "repetition")(answer(sample_id(), [5], [10] * 6)) is None  # a token too short for one
    torn = Sample.of(sample_id(), [5] + [10, 11, 99] * 20, versions=[-1] + [3, 3, -1] * 20)
    assert built("sample_filter", "repetition", ngram=3)(torn) is None
    assert built("sample_filter", "repetition", ngram=2)(torn) == "95% of its 2-grams are repeated"


@pytest.mark.parametrize(
    ("use", "options"),
    [
        ("length", {"min_tokens": -1}),
        ("length", {"max_tokens": 1.5}),
        ("repetition", {"ngram": 0}),
        ("repetition", {"threshold": 1.0}),
        ("status", {"drop": ["late"]}),
    ],
)
def test_options_that_make_no_sense_are_refused(use, options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        built("sample_filter", use, **options)


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0), (30, -1.0)])
def test_overlong_grows_over_the_buffer(tokens, penalty):
    """Equation 13 of DAPO with L_max = 10 and L_cache = 4; the prompt does not count."""
    reward = built("reward", "overlong", max_tokens=10, buffer_tokens=4)
    assert reward(answer(sample_id(), [5] * 50, list(range(tokens)))) == penalty


def test_overlong_refuses_a_buffer_longer_than_the_limit():
    with pytest.raises(ValidationError, match="the buffer is longer than max_tokens, 10; lower it"):
        built("reward", "overlong", max_tokens=10, buffer_tokens=11)
    assert built("reward", "overlong", max_tokens=10, buffer_tokens=10)(answer(sample_id(), [5], [1])) == -0.1
    with pytest.raises(ValidationError, match="max_tokens"):
        built("reward", "overlong", buffer_tokens=4)


def test_filters_and_overlong_need_no_torch():
    code = "import sys, miles_core.filters, miles_core.rewards.overlong; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
