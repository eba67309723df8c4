"""``reward: math``: what counts as the answer, and that a sample which hangs is an error with a name, never a 0."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from itertools import pairwise

import psutil
import pytest
from fixtures.gsm8k import CONTEXT, gsm8k

from miles_core.errors import DataError, RunError
from miles_core.plugins import config_class
from miles_core.sample import Sample, SampleId


def sample(response: str | None, label, prompt: str = "q1") -> Sample:
    metadata = {} if response is None else {"response": response}
    return Sample.of(SampleId("run", "policy", prompt, prompt), [1], label=label, metadata=metadata)


def math_reward(**options):
    """With a deadline that a busy machine keeps too."""
    return config_class("reward", "math").model_validate({"use": "math", "timeout_s": 100, **options}).build(CONTEXT)


@pytest.fixture(scope="module")
def reward():
    """Shared by the module: a worker takes seconds to start."""
    built = math_reward()
    yield built
    built.close()


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        ("So 20 + 4.\n#### 24", "24", 1.0),
        ("#### 25", "24", 0.0),
        ("#### 24<eos>", "24", 1.0),
        ("#### 24<|im_end|>\n", "24", 1.0),
        ("#### 24.", "24", 1.0),
        ("#### $1,080", "1080", 1.0),
        ("#### 1080", "1,080", 1.0),
        ("#### -0.5", "-\\frac{1}{2}", 1.0),
        ("#### 12\nno:\n#### 24\nthat is it", "24", 1.0),
        ("#### 24\nno:\n#### 12", "24", 0.0),
        ("#### 24, 25", "24", 0.0),
        ("#### 1 2 3 24", "24", 0.0),
        ("24\n####", "24", 0.0),
        ("The answer is $25$: \\boxed{24}, not 26.", 24, 1.0),
        ("\\boxed{24} or \\boxed{25}", 24, 0.0),
        ("I think 23. The answer is 24.", 24.0, 0.0),  # not marked
        ("<<2<<<<4<<<<24<<<<", 24, 0.0),
        ("no idea", "24", 0.0),
        ("", "24", 0.0),
        ("<call> <<", "24", 0.0),
    ],
)
async def test_what_counts_as_the_answer(reward, response: str, label, expected: float) -> None:
    assert await reward(sample(response, label)) == expected


async def test_unmarked_answers_count_only_where_the_recipe_says_so(reward) -> None:
    built = math_reward(marked=False)
    assert await built(sample("I think 23. The answer is 24.", 24)) == 1.0
    assert await built(sample("I think 24. The answer is 23.", 24)) == 0.0


@pytest.mark.parametrize(
    ("response", "label", "expected"),
    [
        (None, "24", "metadata"),
        ("#### 24", None, "label is None"),
        ("#### 24", "", "nothing of the label ''"),
        ("#### 24", [24], "label is"),
    ],
)
async def test_a_sample_that_cannot_be_scored_is_named(reward, response, label, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as error:
        await reward(sample(response, label, prompt="q7"))
    assert "q7" in str(error.value)


def children() -> set[psutil.Process]:
    """Processes of this process."""
    return set(psutil.Process().children())


async def test_a_sample_that_hangs_is_an_error_and_its_worker_is_replaced() -> None:
    """sympy would compute 9!!!!! for ever."""
    before, patient, hasty = children(), math_reward(workers=1), math_reward(workers=1, timeout_s=0.5)  # of one pool
    assert await patient(sample("#### 24", "24")) == 1.0
    (worker,) = children() - before
    hanging = asyncio.create_task(hasty(sample("#### 9!!!!!", "24", prompt="hangs")))
    behind = asyncio.create_task(patient(sample("#### 24", "24", prompt="behind")))
    with pytest.raises(RunError, match=r"waited 0\.5 s") as error:
        await hanging
    assert "hangs" in str(error.value)
    assert await behind == 1.0
    (other,) = children() - before
    assert other != worker
    patient.close()


async def test_a_worker_that_dies_is_replaced_and_its_sample_scored() -> None:
    before = children()
    one = math_reward(workers=1)
    assert await one(sample("#### 24", "24")) == 1.0
    (worker,) = children() - before
    worker.kill()
    assert await one(sample("#### 25", "24")) == 0.0
    one.close()
    assert children() <= before
    assert await one(sample("#### 24", "24")) == 1.0  # closing is not for ever: the pool is shared
    one.close()
    assert children() <= before


async def test_a_caller_who_gives_up_does_not_mix_up_answers(reward) -> None:
    tasks = [asyncio.create_task(reward(sample("#### 24", "24"))) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    wrong, right = await asyncio.gather(reward(sample("#### 25", "24")), reward(sample("#### 24", "24")))
    assert (wrong, right) == (0.0, 1.0)
    assert [await t for t in tasks[1::2]] == [1.0] * 10


SCORE = """
import asyncio, os, signal, sys, psutil
from miles_core.rewards.math import Math, MathReward
from miles_core.sample import Sample, SampleId
reward = MathReward(Math(use="math", workers=1, timeout_s=5), None)
def score(response):
    return reward(Sample.of(SampleId("r", "p", "q", "g"), [1], label="24", metadata={"response": response}))
async def main():
    assert await score("#### 24") == 1.0
    task = asyncio.create_task(score(sys.argv[2]))
    await asyncio.sleep(0.5)
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    if sys.argv[1] == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(0)
asyncio.run(main())
"""


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exits", "is killed"])
@pytest.mark.parametrize("response", ["#### 24", "#### 9!!!!!"], ids=["idle", "hangs"])
def test_no_process_is_left(end: str, response: str) -> None:
    """However the run ends, even with a worker in the middle of a sample that never ends."""
    process = subprocess.Popen([sys.executable, "-c", SCORE, end, response], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.communicate(timeout=60)[0].split()]
    assert len(workers) == 1
    deadline = time.monotonic() + 60  # timeout_s, two seconds of grace, and a busy machine
    while left := [pid for pid in workers if runs(pid)]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


async def assert_all_score(reward, prompts) -> None:
    scores = await asyncio.gather(*(reward(sample("".join(p.text for p in q.demonstration) + "<eos>", q.label, q.id)) for q in prompts))
    assert [q.id for q, score in zip(prompts, scores, strict=True) if score != 1.0] == []


async def test_real_solutions_score_one(reward) -> None:
    await assert_all_score(reward, list(gsm8k("test", subset={"size": 200})))


@pytest.mark.slow
async def test_every_real_solution_scores_one(reward) -> None:
    await assert_all_score(reward, [*gsm8k("train"), *gsm8k("test")])


async def test_real_answers_of_other_rows_score_zero(reward) -> None:
    """The right answer of one problem is wrong for another whose answer differs."""
    prompts = list(gsm8k("test", subset={"size": 50}))
    pairs = [(a, b) for a, b in pairwise(prompts) if float(a.label) != float(b.label)]
    scores = await asyncio.gather(*(reward(sample(f"#### {a.label}", b.label)) for a, b in pairs))
    assert len(pairs) > 40 and set(scores) == {0.0}
