"""Between buffer and trainer: what is trained, in which optimizer steps, and which columns are asked of whom."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from fixtures.samples import answer, random_samples, sample_id, two_branches
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.config import StageConfig
from miles_core.errors import ConfigError, DataError, RunError
from miles_core.learner import Learner
from miles_core.protocols import CorrectionOutputs, StepReport
from miles_core.refs import SampleRef


def rows(): ...


async def play(prompt, context): ...


def trainer(): ...


def wire(): ...


def value_loss(inputs): ...


value_loss.__miles__ = {"needs": {"values", "returns"}}


def kl(inputs): ...


kl.__miles__ = {"needs": {"ref_logprobs"}}


class Toy:
    """A trainer that writes down what it is asked, and gives a constant for each column."""

    def __init__(self, log, name, seconds=0.0):
        self.log, self.name, self.seconds = log, name, seconds

    async def annotate(self, batch, columns):
        self.log.append((self.name, "annotate", tuple(sorted(columns))))
        await asyncio.sleep(self.seconds)
        return batch.with_columns({c: np.full(batch.n_rows, 0.5, np.float32) for c in columns})

    async def step(self, batch):
        self.log.append((self.name, "step", len(batch.steps)))
        await asyncio.sleep(self.seconds)
        return StepReport({"loss": 1.0}, len(batch.steps))


HERE = f"{__name__}:"
POLICY = {"path": "x", "trainer": HERE + "trainer", "transport": HERE + "wire", "losses": {"ppo": "ppo_clip"}}


def learner(*, models=None, policy=None, advantage=None, filters=None, seconds=0.0, log=None, seed=0, **stage):
    named = {"policy": POLICY | (policy or {}), **(models or {})}
    config = StageConfig.model_validate(
        {"steps": 3, "groups": 2, "data": HERE + "rows", "rollout": HERE + "play", "models": named, **stage}
    )
    trainers = {name: Toy(log if log is not None else [], name, seconds) for name in named}
    return Learner("policy", config, trainers, advantage, filters or {}, seed)


def refs(samples):
    return [SampleRef.of(s) for s in samples]


def group_of(*lengths, group="g0"):
    return [answer(sample_id(t, group=group), [5, 6], [10] * n, reward=float(t)) for t, n in enumerate(lengths)]


# ---- prepare -------------------------------------------------------------------------------------------------------------


def test_a_sample_filter_takes_out_of_training_and_of_the_denominators_alone():
    made = learner(filters={"long": lambda s: "too long" if s.n_sampled > 2 else None, "none": lambda s: None})
    samples = group_of(1, 2, 3)
    batch = made.prepare(refs(samples), step=0)
    assert len(batch) == 3 and batch.segments.tokens == 3 and batch.segments.sequences == 2
    assert batch.segments.sequence_tokens.tolist() == [1, 2, 0]
    assert made.metrics == {"filtered/long": 1 / 3, "filtered/none": 0.0}
    assert samples[2].loss_mask.sum() == 3  # the sample itself stays as it was
    assert batch.rewards.tolist() == [0.0, 1.0, 2.0]  # statistics still see it


@pytest.mark.parametrize("verdict", [True, False])
def test_a_filter_that_answers_yes_or_no_is_told_what_to_answer(verdict):
    made = learner(filters={"mine": lambda s: verdict})
    with pytest.raises(DataError, match=rf"sample filter 'mine' gave {verdict} for sample policy/g0/t0.*None to keep it, or a reason"):
        made.prepare(refs(group_of(1, 2)), step=0)


@settings(max_examples=12)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_every_epoch_trains_every_sample_once_and_keeps_trajectories_together(seed, epochs, minibatches, step):
    samples = random_samples(seed, groups=4)
    made = learner(epochs=epochs, minibatches=minibatches)
    batch = made.prepare(refs(samples), step)
    assert len(batch.steps) == epochs * minibatches
    trajectory = batch.segments.trajectory
    for epoch in range(epochs):
        parts = batch.steps[epoch * minibatches : (epoch + 1) * minibatches]
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(samples)))
        assert not any(set(trajectory[a]) & set(trajectory[b]) for i, a in enumerate(parts) for b in parts[:i])
    again = learner(epochs=epochs, minibatches=minibatches).prepare(refs(samples), step)
    assert all(np.array_equal(a, b) for a, b in zip(batch.steps, again.steps, strict=True))


def test_the_order_is_another_in_every_step_and_for_every_seed():
    samples = [s for g in range(8) for s in group_of(1, 2, group=f"g{g}")]

    def order(seed, step):
        return np.concatenate(learner(minibatches=4, seed=seed).prepare(refs(samples), step).steps).tolist()

    assert len({tuple(order(s, t)) for s in (0, 1) for t in (0, 1)}) == 4


# ---- annotate ------------------------------------------------------------------------------------------------------------

CRITIC = {"role": "critic", "trainer": HERE + "trainer", "transport": HERE + "wire", "losses": {"v": HERE + "value_loss"}}
REFERENCE = {"role": "reference", "trainer": HERE + "trainer", "transport": HERE + "wire"}


@pytest.mark.parametrize(
    ("policy", "models", "asked"),
    [
        ({}, {}, [("policy", "old_logprobs")]),
        ({"losses": {"ppo": {"use": "ppo_clip", "old": "rollout"}}}, {}, []),
        ({"losses": {"nll": "nll"}}, {}, []),
        ({}, {"ref": REFERENCE}, [("policy", "old_logprobs")]),  # nobody needs it: nothing is computed
        ({"losses": {"kl": HERE + "kl"}}, {"ref": REFERENCE}, [("ref", "ref_logprobs")]),
        ({}, {"critic": CRITIC}, [("policy", "old_logprobs"), ("critic", "values")]),
        ({"losses": {"p": "ppo_clip", "kl": HERE + "kl"}}, {"ref": REFERENCE, "critic": CRITIC},
         [("policy", "old_logprobs"), ("ref", "ref_logprobs"), ("critic", "values")]),
    ],
)  # fmt: skip
async def test_each_model_is_asked_for_what_is_needed_and_for_nothing_else(policy, models, asked):
    log = []
    made = learner(policy=policy, models=models, log=log)
    batch = await made.annotate(made.prepare(refs(group_of(1, 2)), 0))
    assert log == [(name, "annotate", (column,)) for name, column in asked]
    assert {column for _, column in asked} <= set(batch.columns)


@pytest.mark.parametrize(
    ("loss", "minibatches", "asked"),
    [
        ({"use": "ppo_clip"}, 1, frozenset()),
        ({"use": "ppo_clip"}, 2, frozenset({"old_logprobs"})),
        ({"use": "kl", "unbiased": True}, 1, frozenset({"ref_logprobs"})),
        ({"use": "clip_cov"}, 1, frozenset({"old_logprobs"})),  # selects before the step
    ],
)
def test_a_trainer_that_knows_old_logprobs_is_not_asked_for_those_of_an_only_optimizer_step(loss, minibatches, asked):
    from miles_core.config import ModelConfig

    policy = ModelConfig.model_validate({"losses": {"policy": loss}, "advantage": "grpo", "trainer": {"use": "torch"}})
    assert policy.required(minibatches) & {"old_logprobs", "ref_logprobs"} == asked


# ---- advantages ----------------------------------------------------------------------------------------------------------


def by_row(inputs):
    """Another number on every row, so that a mix-up would show."""
    import torch

    return torch.arange(len(inputs.columns["logprobs"]), dtype=torch.float64)


def test_rows_that_branches_share_get_the_mean_of_the_branches_and_are_trained_once():
    """Worked by hand: rows of (5 1 10 11 12) and (5 1 10 11 20 21); the first two sampled tokens are predicted at rows 1 and 2."""
    made = learner(advantage=by_row)
    batch = made.prepare(refs(two_branches()), 0)
    assert batch.segments.tokens == 7  # an advantage sees every branch whole
    batch = made.advantages(batch)
    assert batch.array("loss_mask").tolist() == [False, True, True, True, False] + [False, False, False, True, True, False]
    assert batch.segments.tokens == 5
    advantages = batch.array("advantages")
    assert advantages.dtype == np.float32
    assert advantages[[1, 2]].tolist() == [(1 + 6) / 2, (2 + 7) / 2]
    assert advantages[[3, 8, 9]].tolist() == [3, 8, 9]


def test_several_columns_may_be_given():
    made = learner(advantage=lambda inputs: {"advantages": by_row(inputs), "returns": 2 * by_row(inputs)})
    batch = made.advantages(made.prepare(refs(group_of(2, 1)), 0))
    np.testing.assert_array_equal(batch.array("returns"), 2 * batch.array("advantages"))


def test_no_advantage_no_column():
    made = learner()
    batch = made.prepare(refs(group_of(2, 1)), 0)
    assert made.advantages(batch) is batch


def test_it_sees_the_rewards_the_columns_and_the_mask():
    seen = []

    def look(inputs):
        seen.append(inputs)
        return by_row(inputs)

    made = learner(advantage=look, filters={"long": lambda s: "long" if s.n_sampled > 1 else None})
    made.advantages(made.prepare(refs(group_of(1, 2)), 0))
    [inputs] = seen
    assert inputs.rewards.tolist() == [0.0, 1.0]
    assert {"versions", "logprobs", "loss_mask"} <= inputs.columns.keys()
    assert inputs.ops.mask.tolist() == [False, True, False] + [False] * 4


# ---- step ----------------------------------------------------------------------------------------------------------------


async def test_who_learns_is_trained_on_the_same_batch_and_reports_under_its_name():
    log = []
    made = learner(models={"ref": REFERENCE, "critic": CRITIC}, log=log, epochs=2, filters={"f": lambda s: None})
    metrics = await made.step(made.prepare(refs(group_of(1, 2)), 0), 0)
    assert log == [("policy", "step", 2), ("critic", "step", 2)]
    assert metrics == {"filtered/f": 0.0, "loss": 1.0, "optimizer_steps": 2, "critic/loss": 1.0, "critic/optimizer_steps": 2}


async def test_a_frozen_model_waits_while_its_servant_learns():
    log = []
    made = learner(policy={"frozen_steps": 2}, models={"critic": CRITIC}, log=log)
    for stage_step in range(3):
        await made.step(made.prepare(refs(group_of(1, 2)), stage_step), stage_step)
    assert [name for name, *_ in log] == ["critic", "critic", "policy", "critic"]


@pytest.mark.parametrize(("loss", "unit"), [("ppo_clip", "sequence"), ("gspo", "sequence"), ("dpo", "group")])
def test_pairs_stay_together_in_an_optimizer_step(loss, unit):
    made = learner(policy={"losses": {"l": {"use": loss}}}, minibatches=2)
    assert made.unit == unit
    samples = [s for g in range(4) for s in group_of(1, 2, group=f"g{g}")]
    steps = made.prepare(refs(samples), 0).steps
    groups = [{samples[i].id.group for i in step} for step in steps]
    assert (groups[0].isdisjoint(groups[1])) == (unit == "group")


def test_corrections_follow_the_advantage_and_losses_may_ask_for_columns():
    """Half of the rows leave by the first correction; the second sees the rest; the selection by covariance comes last."""
    seen = []

    def first(inputs):
        seen.append(int(inputs.ops.mask.sum()))
        keep = torch.zeros(len(inputs.ops.mask), dtype=torch.bool)
        keep[inputs.ops.mask.nonzero()[:2]] = True
        return CorrectionOutputs(weights=torch.full((len(keep),), 3.0, dtype=torch.float64), keep=keep, metrics={"m": 1.0})

    def second(inputs):
        seen.append(int(inputs.ops.mask.sum()))
        return CorrectionOutputs(weights=torch.full((len(inputs.ops.mask),), 0.5, dtype=torch.float64))

    torch = pytest.importorskip("torch")
    made = learner(advantage=by_row, policy={"losses": {"cov": {"use": "kl_cov", "fraction": 0.5}}})
    made.corrections = {"first": first, "second": second}
    batch = made.prepare(refs(group_of(2, 2)), 0)
    batch = made.advantages(batch.with_columns({"old_logprobs": batch.array("logprobs")}))
    assert seen == [4, 2] and batch.segments.tokens == 2
    assert batch.array("correction_weights")[batch.array("loss_mask")].tolist() == [1.5, 1.5]
    assert made.metrics["correction/first/dropped"] == 0.5 and made.metrics["correction/first/m"] == 1.0
    assert batch.array("high_covariance").sum() == 1  # half of the two rows that are left


def test_two_losses_that_select_for_themselves_are_refused():
    two = {"a": {"use": "kl_cov"}, "b": {"use": "clip_cov"}}
    made = learner(advantage=by_row, policy={"losses": two})
    batch = made.prepare(refs(group_of(2, 2)), 0)
    with pytest.raises(ConfigError, match="loss 'b' adds the column 'high_covariance', which another has added"):
        made.advantages(batch.with_columns({"old_logprobs": batch.array("logprobs")}))


@pytest.mark.parametrize(("call", "what"), [("annotate", "annotate old_logprobs"), ("step", "train one step")])
async def test_a_model_that_hangs_is_named(call, what):
    made = learner(seconds=30, deadlines={"train": 0.05})
    with pytest.raises(RunError, match=rf"the loop waited 0\.05 s for model policy to {what}"):
        await getattr(made, call)(made.prepare(refs(group_of(1, 2)), 0), *([0] if call == "step" else []))
