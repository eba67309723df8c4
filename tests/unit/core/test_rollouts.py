"""Built-in rollouts: how a trajectory ends, what its budgets mean, and what is issued again with another key."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from miles_core.errors import DataError, InfrastructureFailure, RunError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, Generation, Observation, Passage, Prompt, RolloutContext
from miles_core.sample import Status

EOS = 2


class Letters:
    """One token a letter."""

    eos_token_id = EOS

    def encode(self, text, *, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, token_ids):
        return "".join("$" if t == EOS else chr(t) for t in token_ids)

    def __len__(self):
        return 128


class Script:
    """An engine that says these texts, one a call; ``$`` is the end of text. A text that does not fit is cut."""

    version = 3

    def __init__(self, *texts):
        self.texts = list(texts)
        self.requests, self.released = [], []

    async def generate(self, request):
        self.requests.append(request)
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        tokens = [EOS if c == "$" else ord(c) for c in text][: request.sampling.max_tokens]
        finish = "length" if len(text) > len(tokens) else "stop"
        n = len(tokens)
        return Generation(
            np.array(tokens, np.int32), np.full(n, -0.5, np.float32), np.full(n, 3, np.int32), "abort" if text == "!" else finish
        )

    async def release(self, session):
        self.released.append(session)


class Echo:
    """A world that answers ``<what was said>`` until it hears ``bye``, then gives a point."""

    async def reset(self, prompt):
        return Observation(prompt.text, stop=("hi",), metadata={"seed": prompt.id})

    async def step(self, action):
        if "bye" in action:
            return Observation("(done)", done=True, reward=1.0, metadata={"heard": "bye"})
        return Observation(f"<{action}>")


class Silent(Echo):
    """A world that gives points on the way, and never ends."""

    async def reset(self, prompt):
        return Observation(prompt.text, reward=0.25, stop=("a", "b", "c"))

    async def step(self, action):
        return Observation("x" * 10, reward=0.5, stop=("a", "b", "c"))


def play(engine, *, prompt="Q", environment=None, group_size=1, **options):
    """A group by ``rollout: trajectories`` over this engine."""
    sampling = {"max_tokens": options.pop("max_tokens", 20), **options.pop("sampling", {})}
    given = {"use": "trajectories", "group_size": group_size, "sampling": sampling, **options}
    if environment is not None:
        given["environment"] = f"{__name__}:{environment.__name__}"
    rollout = config_class("rollout", "trajectories").model_validate(given).build(BuildContext(None, "run", 0))
    context = RolloutContext("run", 0, 0, "g0", ("policy",), {"policy": engine}, {"policy": Letters()})
    return rollout(Prompt("p7", prompt, label=3, metadata={"level": 1}), context)


def text(sample):
    return Letters().decode(sample.tokens.tolist())


def trained(sample):
    return Letters().decode(sample.tokens[sample.loss_mask].tolist())


# ---- how a trajectory ends -----------------------------------------------------------------------------------------------


async def test_one_turn_without_an_environment():
    engine = Script("ab$")
    [sample] = await play(engine)
    assert (text(sample), trained(sample), sample.status) == ("Qab$", "ab$", Status.COMPLETED)
    assert sample.rewards == {} and sample.reward is None
    assert (sample.prompt, sample.label, sample.metadata) == ("Q", 3, {"level": 1, "response": "ab$"})
    assert (sample.id.run, sample.id.policy, sample.id.prompt, sample.id.group) == ("run", "policy", "p7", "g0")
    assert engine.released == [engine.requests[0].session]
    sample.validate(vocab_size=128)


async def test_a_stop_text_ends_it_where_no_environment_answers():
    [sample] = await play(Script("ab"), sampling={"stop": ["b"], "temperature": 0.5})
    assert sample.status == Status.COMPLETED and sample.spans[0].temperature == 0.5


async def test_turns_with_an_environment_until_it_is_done():
    engine = Script("hi", "bye")
    [sample] = await play(engine, environment=Echo)
    assert (text(sample), trained(sample), sample.status) == ("Qhi<hi>bye", "hibye", Status.COMPLETED)
    assert [(t.role, t.end - t.start) for t in sample.turns] == [("user", 1), ("assistant", 2), ("environment", 4), ("assistant", 3)]
    assert sample.rewards == {"environment": 1.0}
    assert sample.metadata == {"level": 1, "seed": "p7", "heard": "bye", "response": "hi<hi>bye"}
    # Each turn sees the whole context, what is left of the budget, and the observation's own stop texts.
    assert [Letters().decode(r.tokens.tolist()) for r in engine.requests] == ["Q", "Qhi<hi>"]
    assert [(r.sampling.max_tokens, r.sampling.stop) for r in engine.requests] == [(20, ("hi",)), (18, ())]
    assert len({r.key for r in engine.requests}) == 1 and len({r.session for r in engine.requests}) == 1
    assert len(engine.released) == 1


async def test_the_end_of_text_ends_it_even_if_the_environment_would_go_on():
    [sample] = await play(Script("hi$"), environment=Echo)
    assert (text(sample), sample.status, sample.rewards) == ("Qhi$", Status.COMPLETED, {"environment": 0.0})


@pytest.mark.parametrize("stop, turns", [((), 1), (("never",), 1), (("d",), 2)])
async def test_a_stop_that_nobody_asked_for_is_an_end_of_text(stop, turns):
    """Models have several ids that end a text; the tokenizer knows one of them."""
    engine = Script("and", "bye$")
    [sample] = await play(engine, environment=Echo, sampling={"stop": list(stop)})
    assert sample.status == Status.COMPLETED and len(engine.requests) == turns
    assert text(sample) == ("Qand" if turns == 1 else "Qand<and>bye$")


async def test_rewards_on_the_way_add_up():
    [sample] = await play(Script("a", "b", "c"), environment=Silent, generate={"use": "turns", "max_turns": 3})
    assert sample.status == Status.TRUNCATED and sample.rewards == {"environment": 0.25 + 3 * 0.5}


async def test_what_is_truncated_has_a_reward_though_the_environment_gave_none():
    [sample] = await play(Script("a" * 30), environment=Echo)
    assert sample.status == Status.TRUNCATED and sample.n_sampled == 20 and sample.rewards == {"environment": 0.0}


async def test_max_tokens_counts_what_is_sampled_over_all_turns():
    engine = Script("abc", "defg", "hijk")
    [sample] = await play(engine, environment=Echo, max_tokens=7, sampling={"stop": ["c", "g"]})
    assert (trained(sample), sample.status) == ("abcdefg", Status.TRUNCATED)
    assert [r.sampling.max_tokens for r in engine.requests] == [7, 4]


@pytest.mark.parametrize("limit", [13, 14, 15, 16, 25])
async def test_max_length_bounds_the_whole_sample_injected_tokens_too(limit):
    [sample] = await play(Script(*["a"] * 9), environment=Silent, max_length=limit)
    assert len(sample) <= limit and sample.status == Status.TRUNCATED
    sample.validate(vocab_size=128)


async def test_a_prompt_that_leaves_no_room_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"prompt p7 has 5 tokens, max_length is 5"):
        await play(Script("a"), prompt="12345", max_length=5)


# ---- infrastructure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["!", InfrastructureFailure("the engine died")])
async def test_a_trajectory_that_failed_is_issued_again_alone_with_another_key(failure):
    engine = Script(failure, "a$")
    [sample] = await play(engine)
    assert sample.id.attempt == 1 and text(sample) == "Qa$"
    first, second = engine.requests
    assert first.key != second.key and first.session != second.session
    assert engine.released == [first.session, second.session]


async def test_it_is_issued_only_so_often():
    engine = Script(*[InfrastructureFailure("the engine died")] * 2)
    with pytest.raises(RunError, match=r"trajectory policy/g0/t0\.b0@1 failed 2 times, last: the engine died"):
        await play(engine, attempts=2)
    assert len(engine.requests) == len(engine.released) == 2


async def test_another_error_is_not_tried_again():
    engine = Script(DataError("a token id is out of range"), "a$")
    with pytest.raises(DataError, match="out of range"):
        await play(engine)
    assert len(engine.requests) == len(engine.released) == 1


async def test_one_failure_ends_the_group_and_leaves_nothing_running():
    class OneFails(Script):
        async def generate(self, request):
            self.requests.append(request)
            if len(self.requests) == 3:
                raise DataError("mine")
            await asyncio.Event().wait()

    engine = OneFails()
    with pytest.raises(DataError, match="mine"):
        await play(engine, group_size=4)
    assert len(engine.released) == len(engine.requests)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_members_of_a_group_have_keys_of_their_own_and_always_the_same():
    engines = [Script(*["a$"] * 4) for _ in range(2)]
    groups = [await play(e, group_size=4) for e in engines]
    assert [s.id.trajectory for s in groups[0]] == [0, 1, 2, 3]
    keys = [[r.key for r in e.requests] for e in engines]
    assert keys[0] == keys[1] and len(set(keys[0])) == 4


# ---- reading -------------------------------------------------------------------------------------------------------------


def read(prompt, *, use="read", **options):
    rollout = config_class("rollout", use).model_validate({"use": use, **options}).build(BuildContext(None, "run", 0))
    return rollout(prompt, RolloutContext("run", 0, 0, "g0", ("policy",), {}, {"policy": Letters()}))


async def test_a_demonstration_is_read_its_trained_passages_under_the_mask():
    passages = (Passage("ab", trained=True), Passage("R", trained=False, role="tool"), Passage("c", trained=True))
    [sample] = await read(Prompt("p7", "Q", label=3, demonstration=passages))
    assert (text(sample), trained(sample)) == ("QabRc$", "abc$")
    assert (sample.versions == -1).all() and np.isnan(sample.logprobs).all() and sample.status == Status.COMPLETED
    assert [t.role for t in sample.turns] == ["user", "assistant", "tool", "assistant", "assistant"]
    sample.validate(vocab_size=128, rl=False)


async def test_a_demonstration_that_ends_with_another_speaker_is_not_ended():
    [sample] = await read(Prompt("p7", "Q", demonstration=(Passage("a", trained=True), Passage("R", trained=False))))
    assert text(sample) == "QaR"


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        (Prompt("p7", "Q"), {}, r"prompt p7 has no demonstration to read; rollout 'read' needs data with demonstrations"),
        (
            Prompt("p7", "Q", demonstration=(Passage("abc", True),)),
            {"max_length": 4},
            r"prompt p7: .* has 5 tokens, more than max_length 4",
        ),
    ],
)
async def test_what_cannot_be_read_names_the_prompt(prompt, options, expected):
    with pytest.raises(DataError, match=expected):
        await read(prompt, **options)


# ---- read_pairs ----------------------------------------------------------------------------------------------------------

BETTER, WORSE = (Passage("ab", trained=True), Passage("R", trained=False, role="tool"), Passage("c", trained=True)), (Passage("d", True),)


async def test_a_pair_is_two_trajectories_the_better_one_rewarded():
    samples = await read(Prompt("p7", "Q", label=3, demonstration=BETTER, rejected=WORSE), use="read_pairs")
    assert [(text(s), trained(s)) for s in samples] == [("QabRc$", "abc$"), ("Qd$", "d$")]
    assert [s.rewards for s in samples] == [{"environment": 1.0}, {"environment": 0.0}]
    assert [(s.id.group, s.id.trajectory, s.id.branch) for s in samples] == [("g0", 0, 0), ("g0", 1, 0)]
    for sample in samples:
        sample.validate(vocab_size=128, rl=False)


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        (Prompt("p7", "Q", rejected=WORSE), {}, "prompt p7 has no demonstration; rollout 'read_pairs' needs data with"),
        (Prompt("p7", "Q", demonstration=BETTER), {}, "prompt p7 has no rejected; rollout 'read_pairs' needs data with"),
        (Prompt("p7", "Q", demonstration=WORSE, rejected=BETTER), {"max_length": 5}, "prompt p7: .* has 6 tokens, more than max_length 5"),
    ],
)
async def test_a_pair_that_cannot_be_read_names_the_prompt(prompt, options, expected):
    with pytest.raises(DataError, match=expected):
        await read(prompt, use="read_pairs", **options)
