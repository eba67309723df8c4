"""Rewards that read a response, ``exact_match``, ``f1``, ``regex``; and ``length``, which counts it."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace

import pytest
from fixtures.rewards import CONTEXT, END, Tokenizer, config, responded, score, scorer
from fixtures.samples import answer, sample_id, tool_turn
from pydantic import ValidationError

from miles_core.errors import DataError, RunError

EVIL = r"(a|aa)+$"
"""Takes exponentially long on many a's and a b."""

# ---- exact_match ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "label", "ignore", "expected"),
    [
        ("Paris", "Paris", [], 1.0),
        (" Paris\n", "Paris", [], 1.0),
        (f"Paris{END}", "Paris", [], 1.0),
        (f"Paris{END}{END}", "Paris", [], 0.0),  # one end of text is the policy's; the rest is what it wrote
        ("<b>Paris</b>", "<b>Paris</b>", [], 1.0),
        ("paris", "Paris", [], 0.0),
        ("STRASSE", "straße", ["case"], 1.0),
        ("Paris.", "Paris", [], 0.0),
        ("Paris.", "Paris", ["punctuation"], 1.0),
        ("New  York\nCity", "New York City", [], 0.0),
        ("New  York\nCity", "New York City", ["whitespace"], 1.0),
        ("new\tyork!", "New York", ["case", "punctuation", "whitespace"], 1.0),
        ("24", 24, [], 1.0),
        ("24.0", 24, [], 0.0),
        ("24.0", 24.0, [], 1.0),
        ("Bern", ["Paris", "Bern"], [], 1.0),
        ("Rome", ["Paris", "Bern"], [], 0.0),
        ("", "", [], 1.0),
        ("", "Paris", [], 0.0),
    ],
)
async def test_exact_match(response, label, ignore, expected):
    assert await score("exact_match", responded(response, label), ignore=ignore) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [("It is Answer: Rome. No. Answer: Paris", 1.0), ("Answer: Paris. No. Answer: Rome", 0.0), ("Paris", 0.0), ("Answer:", 0.0)],
)
async def test_what_is_compared_may_be_what_a_pattern_finds_last(response, expected):
    assert await score("exact_match", responded(response + END, "Paris"), answer=r"Answer: (\w+)") == expected


@pytest.mark.parametrize("use", ["exact_match", "f1"])
@pytest.mark.parametrize("label", [None, True, {"a": 1}, [], ["Paris", None]], ids=repr)
async def test_a_label_that_cannot_be_compared_is_named(use, label):
    with pytest.raises(DataError, match=r"sample policy/g0/t0\.b0@0: label is .*compares with a text or a number, or a list of these"):
        await score(use, responded("Paris", label))


@pytest.mark.parametrize("use", ["exact_match", "f1", "regex"])
async def test_a_sample_without_a_response_is_named(use):
    sample = responded("x", "Paris")
    del sample.metadata["response"]
    with pytest.raises(DataError, match=r"sample policy/g0/t0\.b0@0: metadata\['response'\] is None; reward .*needs the response's text"):
        await score(use, sample, **({"pattern": "x"} if use == "regex" else {}))


# ---- f1 ------------------------------------------------------------------------------------------------------------------


async def test_f1_is_that_of_squad():
    """Against the implementation in transformers, on answers made of words, articles, punctuation and odd whitespace."""
    from transformers.data.metrics.squad_metrics import compute_f1

    rng = random.Random(0)
    pieces = [
        "the",
        "The",
        "a",
        "an",
        "cat",
        "Cat!",
        "cats",
        "sat",
        "don't",
        "--",
        "é",
        "a–b",
        "an_d",
        "b–the–c",
        "24",
        "$1,000",
        ".",
        "\n",
        "  ",
        "ﬁ",
    ]
    answers = ["", " ", "the", "!", *(" ".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(200))]
    asked = [rng.choices(answers, k=rng.randint(2, 4)) for _ in range(400)]
    samples = [responded(ours, references, trajectory) for trajectory, (ours, *references) in enumerate(asked)]
    await scorer(it=config("f1")).score_group(samples)
    expected = [max(compute_f1(reference, ours) for reference in references) for ours, *references in asked]
    assert [s.reward for s in samples] == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 20 and {0.0, 1.0} <= set(expected)


async def test_f1_of_what_a_pattern_finds():
    assert await score("f1", responded("Hm, a red cat? So: the red dog", "red cat"), answer=r"So: (.*)") == 0.5
    assert await score("f1", responded("the red cat", "red cat"), answer=r"So: (.*)") == 0.0


# ---- regex ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "pattern", "expected"),
    [
        ("<think>x</think>\n<answer>4</answer>", r"(?s)\A<think>.*</think>\s*<answer>.*</answer>\Z", 1.0),
        ("<think>x</think>\n<answer>4</answer> bye", r"(?s)\A<think>.*</think>\s*<answer>.*</answer>\Z", 0.0),
        ("so YES", r"\byes\b", 0.0),
        ("so YES", r"(?i)\byes\b", 1.0),
        ("", r"\A\Z", 1.0),
        ("Čeština", r"\p{Lu}", 1.0),
    ],
)
@pytest.mark.parametrize("end", ["", END])
async def test_regex(response, pattern, expected, end):
    assert await score("regex", responded(response + end), pattern=pattern) == expected


@pytest.mark.parametrize(
    ("use", "given"),
    [
        ("regex", {"pattern": EVIL}),
        ("exact_match", {"answer": EVIL}),
        ("f1", {"answer": EVIL}),
    ],
)
async def test_a_pattern_that_would_take_for_ever_is_given_up_and_named(use, given):
    samples = [responded("a" * 60 + "b", "a"), responded("b", "a", 1)]
    with pytest.raises(RunError, match=r"sample policy/g0/t0\.b0@0: '\(a\|aa\)\+\$' was not done with 61 characters within 0\.2 s .*raise"):
        async with asyncio.timeout(15):  # a guard: without its own deadline it would go on for hours
            await scorer(it=config(use, timeout_s=0.2, **given)).score_group(samples)


async def test_others_run_while_a_pattern_is_searched():
    """It is searched in a thread that lets others go on: a second thread reaches its event before the first gives up."""
    reached = threading.Event()
    scoring = scorer(slow=config("regex", pattern=EVIL, timeout_s=5))
    task = asyncio.create_task(scoring.score_group([responded("a" * 60 + "b")]))
    await asyncio.sleep(0)
    thread = threading.Thread(target=reached.set)
    thread.start()
    await asyncio.to_thread(reached.wait, 5)
    assert reached.is_set() and not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("use", "given", "said"),
    [
        ("regex", {"pattern": "("}, r"'\(' is no regular expression: missing \) at position 1"),
        ("regex", {}, "pattern"),
        ("exact_match", {"answer": "Answer: .*"}, "has 0 groups; put one pair of parentheses"),
        ("f1", {"answer": "(a)(b)"}, "has 2 groups"),
        ("exact_match", {"ignore": ["colour"]}, "case"),
        ("length", {"per_token": 0.1}, "neither min_tokens nor max_tokens is given"),
        ("length", {"per_token": 0.1, "min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, more than max_tokens, 4"),
        ("length", {"per_token": 0, "max_tokens": 4}, "greater than 0"),
        ("length", {"per_token": float("nan"), "max_tokens": 4}, "greater than 0|finite"),
        ("length", {"per_token": 1, "max_tokens": 4, "weight": float("inf")}, "finite"),
        ("length", {"per_token": 1, "max_tokens": 4, "timeout_s": 0}, "greater than 0"),
    ],
)
def test_options_that_make_no_sense_are_found_when_they_are_read(use, given, said):
    with pytest.raises(ValidationError, match=said):
        config(use, **given)


# ---- length --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampled", "range_", "expected"),
    [
        (4, {"max_tokens": 4}, 0.0),
        (7, {"max_tokens": 4}, -0.75),
        (1, {"min_tokens": 4}, -0.75),
        (9, {"min_tokens": 4}, 0.0),
        (5, {"min_tokens": 4, "max_tokens": 6}, 0.0),
        (2, {"min_tokens": 5, "max_tokens": 5}, -0.75),
        (8, {"min_tokens": 5, "max_tokens": 5}, -0.75),
    ],
)
async def test_length(sampled, range_, expected):
    sample = answer(sample_id(), [5, 6, 7], [10] * sampled)
    assert await score("length", sample, per_token=0.25, **range_) == expected


async def test_injected_tokens_cost_nothing():
    [sample] = tool_turn()  # nine tokens, five of them sampled
    sample.reward = None
    assert await score("length", sample, per_token=1, max_tokens=3) == -2.0


class Turns(Tokenizer):
    """A chat model's: it ends a text with 7, or a turn with 8 or 9."""

    def decode(self, token_ids):
        return "".join({7: END, 5: "Paris", 8: "<|eot|>", 9: "<|eot|><|eom|>"}.get(id, "?") for id in token_ids)


@pytest.mark.parametrize(
    ("response", "expected"),
    [(f"Paris{END}", 1.0), ("Paris<|eot|>", 1.0), ("Paris<|eot|><|eom|>", 1.0), ("Paris<|eot|><|eot|>", 0.0), ("Paris<|eot|> ", 0.0)],
)
def test_whatever_ends_the_text_is_no_part_of_it(tmp_path, response, expected):
    """The model's files name several such tokens; one of them is taken off."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    context = replace(CONTEXT, tokenizer=Turns(), model_path=tmp_path)
    assert config("exact_match").build(context)(responded(response, "Paris")) == expected


def test_an_id_that_does_not_go_with_the_tokenizer_is_some_default(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 5}')
    context = replace(CONTEXT, tokenizer=Turns(), model_path=tmp_path)
    assert config("exact_match").build(context)(responded(f"Paris{END}", "Paris")) == 1
    assert config("exact_match").build(context)(responded("Paris", "Paris")) == 1
