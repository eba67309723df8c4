"""Rewards in a recipe: what ``miles check`` finds, what a run asks for before it begins, what may change when it goes on."""

from __future__ import annotations

import pytest
from fixtures.rewards import options

from miles_core.check import check, missing
from miles_core.config import RunConfig, resolve
from miles_core.errors import ConfigError

JUDGE = options("judge", base_url="http://127.0.0.1:9/v1", model="m", template="{response}", score_range=[1, 5])
HTTP = options("http", url="http://127.0.0.1:9/score")


def run(evaluated=None, **rewards) -> RunConfig:
    """The quick start with these rewards, and these for what it evaluates."""
    data = resolve("quickstart").model_dump(mode="json")
    stage = data["stages"]["rl"]
    stage["rewards"] = rewards
    stage["evaluators"]["held_out"]["rewards"] = evaluated
    return RunConfig.from_mapping(data)


def test_all_of_them_are_a_recipe():
    whole = options(
        "weighted_sum",
        weight=0.5,
        parts={
            "exact": options("exact_match", answer=r"ans (\S+)", ignore=["case", "whitespace"]),
            "f1": options("f1", weight=0.1),
            "form": options("regex", pattern=r"\A(<call>.*</call>)*", weight=0.1),
            "brief": options("length", per_token=0.01, max_tokens=40),
            "inner": options("weighted_sum", parts={"judge": JUDGE, "service": HTTP}),
        },
    )
    config = run(quality=whole)
    check(config)
    assert missing(config) == []
    again = RunConfig.from_mapping(config.model_dump(mode="json"))
    assert again.to_yaml() == config.to_yaml() and again.fingerprint() == config.fingerprint()


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (options("regex", pattern="("), r"rewards\.it\.pattern: '\(' is no regular expression: missing \) at position 1"),
        (JUDGE | {"template": "{respones}"}, r"rewards\.it\.template: the template names \{respones\}\. Did you mean 'response'"),
        (JUDGE | {"base_url": "127.0.0.1:9"}, r"rewards\.it\.base_url: '127\.0\.0\.1:9' is no URL"),
        (HTTP | {"uri": "x"}, r"unknown key 'rewards\.it\.uri'\. Did you mean 'url'"),
        (options("weighted_sum", parts={"a": HTTP | {"url": "x"}}), r"rewards\.it\.parts\.a\.url: 'x' is no URL"),
    ],
)
def test_a_mistake_is_found_before_anything_is_built(reward, said):
    with pytest.raises(ConfigError, match=said):
        run(it=reward)


@pytest.mark.parametrize("where", ["a reward", "a part", "an evaluator", "a part of an evaluator"])
def test_parts_are_asked_too(where, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    lacking = {**JUDGE, "template": None, "template_file": "/nowhere/judge.txt", "key_variable": "NOT_SET"}
    reward = options("weighted_sum", parts={"deep": options("weighted_sum", parts={"it": lacking})}) if "part" in where else lacking
    config = run(evaluated={"it": reward}) if "evaluator" in where else run(it=reward)
    with pytest.raises(ConfigError, match=r"template_file /nowhere/judge\.txt cannot be read"):
        check(config)
    [sentence] = missing(config)
    assert sentence.startswith("reward ") and "the environment variable NOT_SET" in sentence


def test_a_run_may_go_on_with_another_service_and_more_patience_but_no_other_judge():
    def one(**changes):
        nested = options("weighted_sum", parts={"judge": JUDGE | changes})
        return run(sum=nested, top=JUDGE | changes, evaluated={"sum": nested}).fingerprint()

    assert one() == one(timeout_s=5) == one(base_url="http://127.0.0.1:10/v1") == one(attempts=9, concurrency=2, key_variable="K")
    assert len({one(), one(model="n"), one(template="{prompt} {response}"), one(score_range=[1, 6]), one(weight=2.0)}) == 5
