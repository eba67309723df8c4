"""``evaluator: sampled``: avg@k and pass@k over trajectories, the same draws each time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from miles_core.errors import InfrastructureFailure, RunError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, Generation, Players, Prompt
from miles_core.randomness import uniform
from miles_core.sample import Sample, SampleId, Status

LETTERS = "abcd"


class Tokens:
    eos_token_id = None

    def encode(self, text, *, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))

    def __len__(self):
        return 128


class Coin:
    """An engine that draws one of four letters with the request's key; remembers what it drew."""

    version = 0

    def __init__(self):
        self.drawn = []

    async def generate(self, request):
        n = request.sampling.max_tokens
        draws = uniform(np.full(n, request.key, np.uint64), np.arange(n))
        tokens = np.array([ord(LETTERS[int(u * 4)]) for u in draws], np.int32)
        self.drawn.append((request.key, "".join(map(chr, tokens)), request.sampling))
        return Generation(tokens, np.full(n, np.log(0.25), np.float32), np.zeros(n, np.int32), "stop")

    async def release(self, session): ...


class Questions:
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return Prompt(f"q{index}", "?", label=LETTERS[index % 4])


def right(sample):
    return float(sample.metadata["response"][0] == sample.label)


def down(sample):
    raise InfrastructureFailure("the judge is down")


def batch_right(samples):
    return [right(s) for s in samples]


batch_right.__miles__ = {"unit": "batch"}


async def two_branches(trajectory):
    """Every trajectory is two samples; the reward looks at the last."""
    out = []
    for branch, letter in enumerate(("z", LETTERS[trajectory.id.trajectory])):
        id = SampleId(**(vars(trajectory.id) | {"branch": branch}))
        out.append(Sample.of(id, [63, ord(letter)], label=trajectory.prompt.label, metadata={"response": letter}, status=Status.TRUNCATED))
    return out


def evaluator(*, reward="right", rollout=None, rollout_of_its_own=None, **options):
    options |= {"rollout": rollout_of_its_own} if rollout_of_its_own else {}
    made = config_class("rollout", "trajectories").model_validate(
        {"use": "trajectories", "group_size": 8, "sampling": {"max_tokens": 2}, **(rollout or {})}
    )
    rewards = {"r": config_class("reward", f"{__name__}:{reward}").model_validate({"use": f"{__name__}:{reward}"})}
    context = BuildContext(None, "run", 0, stage=SimpleNamespace(rollout=made, rewards=rewards, environment_weight=1.0))
    return (
        config_class("evaluator", "sampled").model_validate({"use": "sampled", "data": f"{__name__}:Questions", **options}).build(context)
    )


def players(engine, seed=0):
    return Players("run", seed, ("policy",), {"policy": engine}, {"policy": Tokens()}, {"policy": 128})


async def test_avg_and_pass_at_k_are_of_the_letters_that_were_drawn():
    engine = Coin()
    found = await evaluator(samples=4).evaluate(players(engine))
    first = np.array([text[0] for _, text, _ in engine.drawn]).reshape(12, 4)
    success = first == np.array([LETTERS[i % 4] for i in range(12)])[:, None]
    assert 0 < success.mean() < 1
    assert found.metrics["avg@4"] == pytest.approx(success.mean())
    assert found.metrics["pass@4"] == pytest.approx(success.any(axis=1).mean())
    assert found.metrics["reward"] == pytest.approx(success.mean())
    assert (found.metrics["length"], found.metrics["truncated"]) == (2.0, 0.0)
    assert len(found.samples) == 48 and all(s.id.group.startswith("eval-q") for s in found.samples)


async def test_pass_at_one_is_avg_at_one_and_not_said_twice():
    found = await evaluator().evaluate(players(Coin()))
    assert set(found.metrics) == {"avg@1", "reward", "length", "truncated"}


async def test_the_draws_are_the_same_each_time_and_others_for_another_seed():
    engines = [Coin(), Coin(), Coin()]
    made = evaluator(samples=2)
    for engine, seed in zip(engines, (0, 0, 1), strict=True):
        await made.evaluate(players(engine, seed))
    assert engines[0].drawn == engines[1].drawn
    assert {k for k, *_ in engines[0].drawn}.isdisjoint(k for k, *_ in engines[2].drawn)


async def test_only_the_first_prompts_with_sampling_of_its_own():
    engine = Coin()
    found = await evaluator(prompts=3, samples=2, sampling={"max_tokens": 5, "temperature": 0.5}).evaluate(players(engine))
    assert [s.id.prompt for s in found.samples] == ["q0", "q0", "q1", "q1", "q2", "q2"]
    assert {(s.max_tokens, s.temperature) for *_, s in engine.drawn} == {(5, 0.5)}
    assert found.metrics["length"] == 5.0
    more = await evaluator(prompts=99).evaluate(players(Coin()))
    assert len(more.samples) == 12


async def test_a_stage_that_reads_is_evaluated_by_a_rollout_of_the_evaluators_own():
    engine = Coin()
    own = {"use": "trajectories", "sampling": {"max_tokens": 3}}
    found = await evaluator(rollout={"sampling": {"max_tokens": 2}}, prompts=2, **{"rollout_of_its_own": own}).evaluate(players(engine))
    assert len(found.samples) == 2 and {s.max_tokens for *_, s in engine.drawn} == {3}


async def test_success_begins_at_a_reward():
    assert (await evaluator(success=0.0).evaluate(players(Coin()))).metrics["avg@1"] == 1.0
    assert (await evaluator(success=1.5).evaluate(players(Coin()))).metrics["avg@1"] == 0.0


async def test_batch_rewards_count():
    one, other = Coin(), Coin()
    by_batch = await evaluator(reward="batch_right", samples=2).evaluate(players(one))
    by_sample = await evaluator(samples=2).evaluate(players(other))
    assert by_batch.metrics == by_sample.metrics and by_batch.metrics["reward"] > 0


async def test_a_service_that_fails_ends_the_evaluation_with_its_sentence():
    with pytest.raises(RunError, match="the judge is down"):
        await evaluator(reward="down").evaluate(players(Coin()))


async def test_a_trajectory_of_several_samples_counts_once():
    rollout = {"generate": f"{__name__}:two_branches"}
    found = await evaluator(rollout=rollout, samples=3, prompts=4).evaluate(players(Coin()))
    # Trajectory t says letter t; prompt i asks for letter i: of 4 prompts × 3 trajectories, 3 are right, in 3 of 4 prompts.
    assert found.metrics["avg@3"] == pytest.approx(3 / 12) and found.metrics["pass@3"] == pytest.approx(3 / 4)
    assert found.metrics["reward"] == pytest.approx(3 / 12) and found.metrics["truncated"] == 1.0
    assert len(found.samples) == 24
