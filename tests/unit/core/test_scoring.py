"""Rewards: one finite number for every trajectory, from whatever a user's function gives, or a sentence that names the sample."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.samples import answer, sample_id
from pydantic import ValidationError

from miles_core import calls, scoring
from miles_core.errors import DataError, InfrastructureFailure, PluginError, RunError
from miles_core.plugins import RewardConfig
from miles_core.protocols import Score
from miles_core.refs import SampleRef
from miles_core.rewards.weighted_sum import WeightedSum
from miles_core.rollout_metrics import rollout_metrics
from miles_core.scoring import Scorer


def reward(function, *, unit="sample", weight=1.0, timeout_s=100.0):
    """A recipe's reward that is this function."""

    class Config(RewardConfig):
        point = "reward"

        def build(self, context):
            return function

    Config.unit = unit
    return Config(use="mine", weight=weight, timeout_s=timeout_s)


def scorer(**configs):
    return Scorer(configs, None)


def group(*lengths, group="g0", **fields):
    """One trajectory for each number, which says how many tokens were sampled."""
    return [answer(sample_id(t, group=group), [5, 6], [10] * n, **fields) for t, n in enumerate(lengths)]


def length(sample):
    return float(sample.n_sampled)


async def alength(sample):
    await asyncio.sleep(0)
    return float(sample.n_sampled)


class Callable:
    def __call__(self, sample):
        return float(sample.n_sampled)


class AsyncCallable:
    async def __call__(self, sample):
        return float(sample.n_sampled)


# ---- what is called, and how ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [length, alength, Callable(), AsyncCallable(), functools.partial(length), functools.partial(alength)])
async def test_a_sample_reward_may_be_any_callable(function):
    samples = group(1, 2, 3)
    await scorer(mine=reward(function)).score_group(samples)
    assert [s.reward for s in samples] == [1.0, 2.0, 3.0]
    assert [s.rewards for s in samples] == [{"mine": 1.0}, {"mine": 2.0}, {"mine": 3.0}]


@pytest.mark.parametrize(
    "given",
    [
        [1.0, 2, True],
        (1.0, 2, True),
        np.array([1, 2, 1]),
        np.array([1.0, 2.0, 1.0], np.float32),
        [np.float32(1), np.int64(2), np.bool_(True)],
    ],
)
@pytest.mark.parametrize("unit", ["group", "batch"])
async def test_group_and_batch_rewards_give_one_number_for_each(unit, given):
    samples, seen = group(1, 2, 3), []

    def mine(members):
        seen.append(members)
        return given

    scoring = scorer(mine=reward(mine, unit=unit))
    await (scoring.score_group if unit == "group" else scoring.score_batch)(samples)
    assert [s.reward for s in samples] == [1.0, 2.0, 1.0] and all(type(s.reward) is float for s in samples)
    assert seen == [samples]


async def test_torch_numbers_are_numbers():
    torch = pytest.importorskip("torch")
    samples = group(1, 2)
    await scorer(a=reward(lambda s: torch.tensor(0.5)), b=reward(lambda g: torch.tensor([1.0, 2.0]), unit="group")).score_group(samples)
    assert [s.reward for s in samples] == [1.5, 2.5]


async def test_a_function_that_reorders_its_argument_changes_nothing():
    samples = group(3, 1, 2)

    def mine(members):
        values = [m.n_sampled for m in members]
        members.sort(key=lambda m: m.n_sampled)
        return values

    await scorer(mine=reward(mine, unit="group")).score_group(samples)
    assert [s.reward for s in samples] == [3.0, 1.0, 2.0]


async def test_samples_of_a_group_are_scored_at_the_same_time():
    all_there = threading.Barrier(3)

    def together(sample):
        all_there.wait(5)  # passes only when three wait at once
        return 1.0

    await scorer(mine=reward(together)).score_group(group(1, 1, 1))


# ---- the sum -------------------------------------------------------------------------------------------------------------


async def test_the_reward_is_the_environments_part_and_the_weighted_others():
    samples = group(2, 3)
    samples[0].rewards["environment"] = 1.0
    samples[1].rewards["environment"] = 0.0
    await scorer(a=reward(length, weight=0.5), b=reward(lambda g: [10.0, 20.0], unit="group", weight=-0.1)).score_group(samples)
    assert [s.reward for s in samples] == [1.0 + 0.5 * 2 - 0.1 * 10, 0.0 + 0.5 * 3 - 0.1 * 20]
    assert samples[0].rewards == {"environment": 1.0, "a": 2.0, "b": 10.0}  # before weighting


async def test_batch_rewards_are_added_when_the_batch_is_there():
    scoring = scorer(a=reward(length), b=reward(lambda batch: [100.0] * len(batch), unit="batch", weight=2))
    assert scoring.has_batch_rewards and not scorer(a=reward(length)).has_batch_rewards
    samples = group(1, 2)
    await scoring.score_group(samples)
    assert [s.reward for s in samples] == [1.0, 2.0]
    for _ in range(2):  # a batch that is scored again (after a resume) gets the same
        await scoring.score_batch(samples)
        assert [s.reward for s in samples] == [201.0, 202.0]


async def test_a_reward_that_the_rollout_gave_itself_is_the_environments_part():
    [sample] = group(2, reward=0.25)
    await scorer(a=reward(length)).score_group([sample])
    assert sample.reward == 2.25 and sample.rewards == {"environment": 0.25, "a": 2.0}
    [sample] = group(2, reward=0.25, rewards={"correct": 1.0})  # other parts are there to be looked at
    await scorer().score_group([sample])
    assert sample.reward == 0.25


async def test_without_any_reward_there_is_none():
    samples = group(1, 2)
    await scorer().score_group(samples)
    assert [s.reward for s in samples] == [None, None]


async def test_parts_that_would_all_count_for_nothing_are_an_error():
    samples = group(1, rewards={"correct": 1.0})
    with pytest.raises(DataError, match=r"sample policy/g0/t0\.b0@0 has the reward parts correct, and none of them counts"):
        await scorer().score_group(samples)


# ---- several samples a trajectory ----------------------------------------------------------------------------------------


def branched():
    """Trajectory 0 has two samples, trajectory 1 one; a second policy has a part in trajectory 0."""
    ids = [sample_id(0, 0), sample_id(0, 1), sample_id(1, 0), sample_id(0, 0, policy="other")]
    return [answer(id, [5, 6], [10] * n) for id, n in zip(ids, (1, 2, 3, 4), strict=True)]


@pytest.mark.parametrize("unit", ["sample", "group"])
async def test_a_trajectory_is_scored_once_by_its_last_sample_and_all_its_samples_carry_it(unit):
    samples, seen = branched(), []

    def mine(given):
        for s in given if unit == "group" else [given]:
            seen.append((s.id.policy, s.id.trajectory, s.id.branch))
        return [length(s) for s in given] if unit == "group" else length(given)

    await scorer(mine=reward(mine, unit=unit)).score_group(samples)
    assert sorted(seen) == [("other", 0, 0), ("policy", 0, 1), ("policy", 1, 0)]
    assert [s.reward for s in samples] == [2.0, 2.0, 3.0, 4.0]


async def test_an_environments_part_on_one_branch_counts_for_the_trajectory():
    samples = branched()
    samples[1].rewards["environment"] = 7.0
    await scorer(mine=reward(length)).score_group(samples)
    assert [s.reward for s in samples] == [9.0, 9.0, 3.0, 4.0]


async def test_branches_that_contradict_each_other_are_named():
    samples = branched()
    samples[0].rewards["environment"], samples[1].rewards["environment"] = 0.0, 1.0
    with pytest.raises(DataError, match=r"reward 'environment' of sample policy/g0/t0\.b1@0 is 1\.0, but 0\.0 of its trajectory's other"):
        await scorer().score_group(samples)


# ---- what is wrong with what it gives ------------------------------------------------------------------------------------


def sync_and_async(function):
    async def later(argument):
        return function(argument)

    return [function, later]


BAD_VALUES = [float("nan"), float("inf"), -float("inf"), None, "1.0", [1.0], np.array([1.0]), np.float32("nan"), {"reward": 1.0}, 1j]


@pytest.mark.parametrize("value", BAD_VALUES, ids=repr)
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_value_that_is_no_finite_number_names_reward_and_sample(value, is_async):
    samples = group(1, 2)
    function = sync_and_async(lambda s: value if s.id.trajectory == 1 else 0.5)[is_async]
    with pytest.raises(DataError, match=r"reward 'mine' of sample policy/g0/t1\.b0@0 is .*; a reward is one finite number"):
        await scorer(mine=reward(function)).score_group(samples)


@pytest.mark.parametrize("value", [float("nan"), None, "1"])
@pytest.mark.parametrize("unit", ["group", "batch"])
async def test_so_does_one_among_those_of_a_group_or_batch(unit, value):
    scoring = scorer(mine=reward(lambda g: [0.5, value, 1.0], unit=unit))
    with pytest.raises(DataError, match=r"reward 'mine' of sample policy/g0/t1\.b0@0"):
        await (scoring.score_group if unit == "group" else scoring.score_batch)(group(1, 2, 3))


@pytest.mark.parametrize(
    ("given", "found"),
    [([1.0, 2.0], "2"), ([], "0"), (1.0, r"1\.0"), (None, "None"), ({0: 1.0}, "{0: 1.0}"), ("abc", "'abc'"), (np.zeros((2, 3)), "2")],
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_group_reward_of_another_length_says_what_was_expected(given, found, is_async):
    function = sync_and_async(lambda g: given)[is_async]
    with pytest.raises(DataError, match=rf"a group reward gives one number for each of 3 samples; found {found}"):
        await scorer(mine=reward(function, unit="group")).score_group(group(1, 2, 3))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("unit", "subject"), [("sample", r"sample policy/g0/t\d\.b0@0"), ("group", r"sample policy/g0/t0\.b0@0 and 1 more")]
)
async def test_an_exception_names_reward_sample_and_cause(unit, subject, is_async):
    function = sync_and_async(lambda argument: 1 / 0)[is_async]
    with pytest.raises(RunError, match=rf"^reward 'mine' of {subject} failed: ZeroDivisionError: division by zero$") as found:
        await scorer(mine=reward(function, unit=unit)).score_group(group(1, 2))
    assert isinstance(found.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("unit", ["sample", "group"])
async def test_a_reward_that_would_end_the_process_has_failed(unit):
    with pytest.raises(RunError, match=r"^reward 'mine' of sample policy/g0/t0.* failed: .*SystemExit"):
        await scorer(mine=reward(lambda argument: sys.exit("no"), unit=unit)).score_group(group(1))


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_reward_that_takes_too_long_is_given_up(is_async):
    release = threading.Event()

    async def later(sample):
        await asyncio.Event().wait()

    function = later if is_async else lambda sample: release.wait(60)
    with pytest.raises(
        RunError,
        match=r"reward 'mine' of sample policy/g0/t0.* waited 0\.05 s for its function tests\..*test_scoring:test_a_reward_that_.* "
        r"Raise the reward's timeout_s",
    ):
        await scorer(mine=reward(function, timeout_s=0.05)).score_group(group(1))
    release.set()
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1"])
async def test_an_environments_part_is_checked_as_well(value):
    samples = group(1, 2)
    samples[1].rewards["environment"] = value
    with pytest.raises(DataError, match=r"reward 'environment' of sample policy/g0/t1\.b0@0"):
        await scorer().score_group(samples)


def test_a_reward_that_never_returns_does_not_keep_the_process_alive(tmp_path):
    (tmp_path / "stuck.py").write_text("import time\ndef mine(sample):\n    while True: time.sleep(60)\n")
    code = """
import asyncio
from miles_core.errors import RunError
from miles_core.plugins import config_class
from miles_core.sample import Sample, SampleId
from miles_core.scoring import Scorer
config = config_class("reward", "stuck:mine").model_validate({"use": "stuck:mine", "timeout_s": 0.1})
async def main():
    try:
        await Scorer({"stuck": config}, None).score_group([Sample.of(SampleId("r", "p", "q", "g"), [1, 2])])
    except RunError as error:
        print(error)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "reward 'stuck' of sample p/g/t0.b0@0 waited 0.1 s" in done.stdout


async def test_the_environment_s_part_weighs_what_the_stage_says():
    samples = group(2)
    samples[0].rewards = {"environment": 1.0}
    await Scorer({"length": reward(length, weight=0.5)}, None, environment_weight=0.0).score_group(samples)
    assert samples[0].reward == 1.0 and samples[0].rewards == {"environment": 1.0, "length": 2.0}


# ---- threads, services, named parts ---------------------------------------------------------------------------------------


async def test_plain_functions_run_in_so_many_threads_and_no_more(monkeypatch):
    monkeypatch.setattr(scoring, "THREADS", 3)
    gate, lock, now, most = threading.Barrier(3), threading.Lock(), 0, 0

    def mine(sample):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        gate.wait(100)  # opens when three are here
        with lock:
            now -= 1
        gate.wait(100)
        return 1.0

    await scorer(a=reward(mine), b=reward(lambda g: [mine(g[0])] * 11, unit="group")).score_group(group(*[1] * 11))
    assert most == 3


async def test_a_deadline_begins_with_its_own_call(monkeypatch):
    """Three calls of 4 s in one thread, 5 s each may take; the clock is the test's."""
    monkeypatch.setattr(scoring, "THREADS", 1)
    now, looked_at, main = [0.0], threading.Event(), threading.current_thread()

    def monotonic():
        if threading.current_thread() is main:
            looked_at.set()
        return now[0]

    def mine(sample):
        now[0] += 4.0
        if now[0] > 4:  # 8 s have passed since all of them began to wait
            looked_at.wait(100)
        return 1.0

    monkeypatch.setattr(calls, "time", SimpleNamespace(monotonic=monotonic))
    samples = group(1, 1, 1)
    await scorer(mine=reward(mine, timeout_s=5.0)).score_group(samples)
    assert [s.reward for s in samples] == [1.0] * 3
    assert looked_at.is_set()


async def test_quick_functions_share_a_thread(monkeypatch):
    monkeypatch.setattr(calls, "QUICK", 60.0)
    threads = set()

    def mine(sample):
        threads.add(threading.current_thread())
        return 1.0

    await scorer(mine=reward(mine)).score_group(group(*[1] * 16))
    assert len(threads) == 1
    assert threading.current_thread() not in threads


async def test_the_event_loop_is_free_while_a_plain_function_runs():
    release = threading.Event()
    task = asyncio.create_task(scorer(mine=reward(lambda s: float(release.wait(10)))).score_group(samples := group(1)))
    await asyncio.sleep(0)
    release.set()  # never reached if the function ran here
    await task
    assert samples[0].reward == 1.0


async def test_rewards_are_asked_at_the_same_time():
    here = [asyncio.Event(), asyncio.Event()]

    async def meets(mine, other):
        here[mine].set()
        await here[other].wait()
        return 1.0

    async def a(sample):
        return await meets(0, 1)

    async def b(members):
        return [await meets(1, 0)]

    [sample] = group(1)
    await scorer(a=reward(a), b=reward(b, unit="group")).score_group([sample])
    assert sample.reward == 2.0


async def test_a_service_that_failed_is_no_fault_of_the_reward():
    def mine(argument):
        raise InfrastructureFailure("the judge is down")

    samples = group(1)
    with pytest.raises(InfrastructureFailure, match="the judge is down"):
        await scorer(mine=reward(mine)).score_group(samples)
    assert samples[0].reward is None
    with pytest.raises(RunError, match="the judge is down"):
        await scorer(mine=reward(mine, unit="batch")).score_batch(samples)


@pytest.mark.parametrize("unit", ["sample", "group"])
async def test_a_score_has_parts_of_its_own(unit):
    def one(sample):
        return Score(length(sample), {"half": length(sample) / 2, "np": np.float32(2)})

    samples = branched()
    await scorer(mine=reward(one if unit == "sample" else lambda g: [one(s) for s in g], unit=unit, weight=3.0)).score_group(samples)
    assert [s.reward for s in samples] == [6.0, 6.0, 9.0, 12.0]
    assert samples[0].rewards == {"mine": 2.0, "mine/half": 1.0, "mine/np": 2.0}


@pytest.mark.parametrize(("score", "which"), [(Score(float("nan")), "mine"), (Score(1.0, {"a": None}), "mine/a"), (Score("1"), "mine")])
async def test_a_score_is_finite_throughout(score, which):
    with pytest.raises(DataError, match=rf"reward '{which}' of sample policy/g0/t0\.b0@0 is .*; a reward is one finite number"):
        await scorer(mine=reward(lambda s: score)).score_group(group(1))


def weighted(weight=1.0, **parts):
    return WeightedSum.model_construct(use="weighted_sum", weight=weight, timeout_s=60.0, parts=parts)


async def test_a_weighted_sum_of_sums_of_samples_groups_and_batches():
    inner = weighted(-2.0, a=reward(length, weight=0.5), b=reward(lambda g: [10.0, 20.0], unit="group"))
    scoring = scorer(quality=weighted(3.0, inner=inner, c=reward(lambda b: [100.0, 200.0], unit="batch")), d=reward(length))
    samples = group(4, 6)
    await scoring.score_group(samples)
    assert [s.reward for s in samples] == [3 * -2 * (0.5 * 4 + 10) + 4, 3 * -2 * (0.5 * 6 + 20) + 6]
    assert scoring.has_batch_rewards
    for _ in range(2):
        await scoring.score_batch(samples)
        assert [s.reward for s in samples] == [3 * (-2 * (0.5 * 4 + 10) + 100) + 4, 3 * (-2 * (0.5 * 6 + 20) + 200) + 6]
    assert samples[0].rewards == {
        "d": 4.0,
        "quality": -2 * 12 + 100.0,
        "quality/inner": 12.0,
        "quality/inner/a": 4.0,
        "quality/inner/b": 10.0,
        "quality/c": 100.0,
    }


async def test_the_parts_are_metrics_once_a_trajectory():
    samples = branched()[:3]  # two samples of a trajectory that gets 2, one of another that gets 3
    await scorer(sum=weighted(-2.0, a=reward(length), b=reward(lambda s: Score(1.0, {"c": length(s)})))).score_group(samples)
    metrics = rollout_metrics([SampleRef.of(s) for s in samples])
    parts = {name: value for name, value in metrics.items() if name.startswith("reward")}
    expected = {"rewards/sum": 3.5, "rewards/sum/a": 2.5, "rewards/sum/b": 1.0, "rewards/sum/b/c": 2.5}
    assert parts == {"reward": -7.0, "reward/std": 1.0} | expected


async def test_a_part_of_a_sum_that_is_wrong_is_named():
    with pytest.raises(DataError, match=r"reward 'sum/bad' of sample policy/g0/t0\.b0@0 is nan"):
        await scorer(sum=weighted(good=reward(length), bad=reward(lambda s: float("nan")))).score_group(group(1))


def test_a_weighted_sum_in_a_recipe():
    half = {"use": "overlong", "max_tokens": 8, "buffer_tokens": 4}
    config = WeightedSum.model_validate({"use": "weighted_sum", "parts": {"a": {**half, "weight": 0.5}, "b": half}})
    assert [p.use for p in config.nested()] == ["weighted_sum", "overlong", "overlong"]
    for wrong, said in (
        ({"parts": {}}, "at least 1 item"),
        ({"parts": {"a/b": half}}, "pattern"),
        ({"parts": {"a": {"use": "overlonk"}}}, "Did you mean 'overlong'"),
        ({"parts": {"a": half}, "timeout_s": 5}, "timeout_s of a weighted_sum would have no effect"),
    ):
        with pytest.raises((ValidationError, PluginError), match=said):
            WeightedSum.model_validate({"use": "weighted_sum", **wrong})
