"""``gsm8k_calculator``: it injects results exactly where a demonstration has them, and nothing anywhere else."""

from __future__ import annotations

from fractions import Fraction

import pytest
from fixtures.gsm8k import CONTEXT, gsm8k

from miles_core.plugins import config_class
from miles_core.protocols import Prompt
from miles_core.sample import Status
from miles_core.tokenizers import TokenizerConfig, build_tokenizer

PROMPT = Prompt("p", "Question: How many clips?\nAnswer:\n", "72")
BPE = TokenizerConfig(kind="bpe", vocab_size=600, special_tokens=("<<", ">>", "=", "####"))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(BPE, ["Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"] * 3)


@pytest.fixture
def environment():
    return config_class("environment", "gsm8k_calculator").model_validate({"use": "gsm8k_calculator"}).build(CONTEXT)


async def test_a_solution_is_computed_while_it_is_written(tokenizer, environment, play, trained) -> None:
    policy = "sold 48/2 = <<48/2=24 clips.\nThat is 48+24 = $<<48+24=72\n#### 72<eos>"
    sample = await play(tokenizer, environment, PROMPT, policy)
    assert sample.metadata["response"] == "sold 48/2 = <<48/2=24>>24 clips.\nThat is 48+24 = $<<48+24=72>>72\n#### 72<eos>"
    assert "".join(trained(tokenizer, sample)) == policy  # all that the policy said is trained, nothing else
    assert sample.status == Status.COMPLETED and sample.rewards == {"environment": 0.0}


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("that is <<48/2=", "24>>"),
        ("<<.5*5=", "2.5>>"),
        ("<<10/4*3=", "7.5>>"),
        ("<<100*20%=", "20>>"),
        ("that is 48/2=", ""),
        ("<<48/2=24>> so x=", ""),
        ("<<x+1=", ""),
        ("<<1/0=", ""),
        ("<<2**9=", ""),
        ("<<" + "9" * 200 + "=", ""),
        ("<<\n1+1=", ""),
        ("<<=", ""),
        ("<<1+1", ""),
        ("", ""),
    ],
)
async def test_what_is_injected(environment, action: str, text: str) -> None:
    world = environment()
    first = await world.reset(PROMPT)
    assert (first.text, first.stop) == (PROMPT.text, ("=",))
    answer = await world.step(action)
    assert (answer.text, answer.done, answer.stop, answer.reward) == (text, False, ("=",), None)


@pytest.mark.parametrize(
    ("action", "done"),
    [
        ("72\n#### 72", True),
        ("72\n#### 72<eos>", True),
        ("#### 1,080\n x =", True),
        ("#### -2.5", True),
        ("####", False),
        ("a #### 72", False),
    ],
)
async def test_the_answer_line_ends_it(environment, action: str, done: bool) -> None:
    world = environment()
    await world.reset(PROMPT)
    assert (await world.step(action)).done is done


@pytest.mark.parametrize("size", [100, pytest.param(1319, marks=pytest.mark.slow)])
async def test_real_demonstrations_play_as_they_are_written(environment, size: int) -> None:
    """Stopping at every "=", as an engine does, it speaks where the demonstration has untrained passages, equal values."""
    for prompt in gsm8k("test", subset={"size": size}):
        if prompt.id == "gsm8k-test-319":
            continue  # <<3/4=3/4>>
        world = environment()
        await world.reset(prompt)
        injected: list[str] = []
        for said in (p.text for p in prompt.demonstration if p.trained):
            *stops, rest = said.split("=")
            for text in stops:
                answer = await world.step(text + "=")
                injected += [answer.text] * bool(answer.text)
        assert (await world.step(rest)).done
        expected = [p.text for p in prompt.demonstration if not p.trained]
        assert [Fraction(t.removesuffix(">>")) for t in injected] == [Fraction(t.removesuffix(">>")) for t in expected]
