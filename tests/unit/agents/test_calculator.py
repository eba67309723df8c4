"""``calculator`` and its problems: one trajectory played by the loop's own turns, and what becomes of every other one."""

from __future__ import annotations

import pytest
from fixtures.gsm8k import CONTEXT
from pydantic import ValidationError

from miles_agents.calculator import WORDS
from miles_core.errors import DataError
from miles_core.plugins import config_class
from miles_core.protocols import Prompt
from miles_core.sample import Status
from miles_core.tokenizers import TokenizerConfig, build_tokenizer

PROBLEM = Prompt("p", "47 + 58 - 12 ?", 93)
BY_TWO_CALLS = " <call> 47 + 58 </call>", " <call> 105 - 12 </call>", " ans 93<eos>"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TokenizerConfig(kind="words", words=WORDS), [])


@pytest.fixture
def environment():
    """As a recipe gets it: a factory, by entry point."""
    return config_class("environment", "calculator").model_validate({"use": "calculator"}).build(CONTEXT)


def problems(**options):
    return config_class("data_source", "calculator_problems").model_validate({"use": "calculator_problems", **options}).build(CONTEXT)


async def test_a_trajectory_with_two_calls(tokenizer, environment, play, trained) -> None:
    sample = await play(tokenizer, environment, PROBLEM, "".join(BY_TWO_CALLS))
    assert tokenizer.decode(sample.tokens.tolist()) == (
        "47 + 58 - 12 ? <call> 47 + 58 </call> <res> 105 </res> <call> 105 - 12 </call> <res> 93 </res> ans 93<eos>"
    )
    assert trained(tokenizer, sample) == list(BY_TWO_CALLS)
    assert sample.rewards == {"environment": 1.0} and sample.status == Status.COMPLETED and sample.label == 93


@pytest.mark.parametrize("label", [None, "many"])
async def test_a_prompt_without_an_answer_says_which_key_names_it(environment, label) -> None:
    with pytest.raises(DataError, match=r"prompt rows\.jsonl:4: its label is .*label_field"):
        await environment().reset(Prompt("rows.jsonl:4", "1 + 1 ?", label=label))


@pytest.mark.parametrize(
    ("policy", "reward", "results"),
    [
        (" ans 93<eos>", 1.0, []),
        (" ans 92<eos>", 0.0, []),
        (" ans -93<eos>", 0.0, []),
        (" ans 93 ans 92<eos>", 0.0, []),
        (" ans 92 ans 93<eos>", 0.0, []),
        (" ans 93 + <eos>", 0.0, []),
        (" ans <eos>", 0.0, []),
        ("<eos>", 0.0, []),
        (" <call> 47 + 58 - 12 </call> ans 93<eos>", 1.0, ["93"]),
        (" <call> 12 - 58 </call> ans 93<eos>", 1.0, ["-46"]),
        (" <call> 47 +  </call> ans 93<eos>", 1.0, ["error"]),
        (" <call>  </call> ans 93<eos>", 1.0, ["error"]),
        (" </call> ans 93<eos>", 1.0, ["error"]),
        (" <call> 1 <call> 2 </call> ans 93<eos>", 1.0, ["2"]),
        (" <call> 1 <res> 2 </call> ans 93<eos>", 1.0, ["error"]),
        (" ans 93 <call> 1 </call> ans 92<eos>", 0.0, ["1"]),
    ],
)
async def test_what_is_answered_and_rewarded(tokenizer, environment, play, policy: str, reward: float, results: list[str]) -> None:
    sample = await play(tokenizer, environment, PROBLEM, policy)
    injected = [t for t in sample.turns if t.role == "environment"]
    assert [tokenizer.decode(sample.tokens[t.start : t.end].tolist()) for t in injected] == [f" <res> {r} </res>" for r in results]
    assert not any(sample.loss_mask[t.start : t.end].any() for t in injected)
    assert sample.rewards == {"environment": reward}


@pytest.mark.parametrize("max_tokens", [1, 7, 8])
async def test_a_trajectory_that_is_cut_is_scored_zero(tokenizer, environment, play, max_tokens: int) -> None:
    """In a call, right behind one (nothing is left to answer with), and in the second. Whoever is cut did not complete anything."""
    sample = await play(tokenizer, environment, PROBLEM, "".join(BY_TWO_CALLS), max_tokens)
    assert sample.rewards == {"environment": 0.0} and sample.status == Status.TRUNCATED


async def test_trajectories_do_not_share_a_world(environment, play, tokenizer) -> None:
    first, second = environment(), environment()
    await first.reset(PROBLEM)
    await second.reset(Prompt("q", "1 + 1 ?", 2))
    assert (await first.step(" ans 93<eos>")).reward == 1.0
    assert (await second.step(" ans 93<eos>")).reward == 0.0


# ---- problems -------------------------------------------------------------------------------------------------------


def test_problems_are_right_and_never_negative() -> None:
    for prompt in problems(size=500):
        a, first, b, second, c, mark = prompt.text.split()
        assert all(len(n) == 2 for n in (a, b, c)) and mark == "?"
        assert eval(f"{a}{first}{b}") >= 0 and eval(f"{a}{first}{b}{second}{c}") == prompt.label >= 0


def test_problems_follow_from_seed_and_index_alone() -> None:
    few, many = problems(size=10, seed=3), problems(size=1_000_000, seed=3)
    assert [few[i] for i in (7, 2)] == [many[i] for i in (7, 2)]
    assert [p.text for p in few] != [p.text for p in problems(size=10, seed=4)]
    with pytest.raises(IndexError):
        few[10]


def test_splits_share_no_problem_whatever_their_seeds() -> None:
    train = {p.text for seed in (0, 1) for p in problems(size=3000, seed=seed)}
    held_out = {p.text for seed in (0, 1, 2) for p in problems(size=500, seed=seed, split="held_out")}
    assert len(train) > 5900 and len(held_out) > 1400
    assert not train & held_out


def test_ids_are_unique_over_both_splits() -> None:
    ids = [p.id for split in ("train", "held_out") for p in problems(size=100, split=split)]
    assert len(set(ids)) == 200


async def test_demonstrations_are_what_the_environment_answers(environment) -> None:
    """A demonstration is a trajectory of reward 1, and its untrained pieces are the environment's very words."""
    for prompt in problems(size=200):
        world = environment()
        observation = await world.reset(prompt)
        for said, answer in zip(prompt.demonstration, [*prompt.demonstration[1:], None], strict=True):
            if said.trained:
                observation = await world.step(said.text)
                assert observation.text == ("" if answer is None else answer.text)
        assert observation.done and observation.reward == 1.0


def test_the_share_of_direct_answers() -> None:
    direct = sum(len(p.demonstration) == 1 for p in problems(size=3000)) / 3000
    assert abs(direct - 0.7) < 0.03  # 3.6 standard errors
    assert {len(p.demonstration) for p in problems(size=50, direct=0)} == {5}
    assert {len(p.demonstration) for p in problems(size=50, direct=1)} == {1}


def test_every_text_is_written_with_the_words_digit_by_digit(tokenizer) -> None:
    """Encoded piece by piece as in a run, without seams, and back to the very text."""
    for prompt in problems(size=300):
        pieces = [prompt.text, *(p.text for p in prompt.demonstration), " <res> error </res>", " <res> -46 </res>"]
        joined = tokenizer.encode("".join(pieces))
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == joined
        assert tokenizer.decode(joined) == "".join(pieces)
        assert sum(t.isdigit() for t in tokenizer.convert_ids_to_tokens(joined)) == sum(c.isdigit() for c in "".join(pieces))


@pytest.mark.parametrize("options", [{}, {"size": 0}, {"size": 1, "split": "test"}, {"size": 1, "direct": 1.5}, {"size": 1, "sise": 2}])
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        problems(**options)
