"""``reward: judge`` over a real server: the template, the score in an answer, and answers without one."""

from __future__ import annotations

import pytest
from fixtures.rewards import CONTEXT, END, config, responded, scorer
from fixtures.services import Raw
from pydantic import ValidationError

from miles_core.errors import ConfigError, DataError, InfrastructureFailure, RunError

TEMPLATE = "Question: {prompt}\nReference: {label}\nAnswer: <answer>{response}</answer>\nReason, then write Score: 1 to 5."


pytestmark = pytest.mark.usefixtures("at_once")


def judge(service, **given):
    url = getattr(service, "url", "http://127.0.0.1:9")
    said = {"base_url": f"{url}/v1", "model": "judgy", "template": TEMPLATE, "score_range": [1, 5], "attempts": 3} | given
    return config("judge", **said)


def said(text):
    """A chat completion."""
    return {"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


async def score(service, sample, **given):
    await scorer(judge=judge(service, **given)).score_group([sample])
    return sample.reward


async def test_what_is_asked(service, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    service.script(said("Good.\nScore: 4"))
    assert await score(service, responded(f"4{END}", 4), key_variable="JUDGE_KEY", request={"temperature": 0, "max_tokens": 99}) == 0.75
    [asked] = service.asked
    assert asked.path == "/v1/chat/completions" and asked.headers["Authorization"] == "Bearer secret"
    content = "Question: Q?\nReference: 4\nAnswer: <answer>4</answer>\nReason, then write Score: 1 to 5."
    assert asked.body == {"temperature": 0, "max_tokens": 99, "model": "judgy", "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize("text", ["{label}", "{0} {", "{{response}}", "{prompt.__class__}", "%s $x \\n"])
async def test_texts_are_put_in_as_they_are(service, text):
    """Nothing in a response is read as part of the template."""
    service.script(said("Score: 5"))
    await score(service, responded(text, "ref"), template="<{response}> {{literal}} {prompt}")
    assert service.asked[0].body["messages"][0]["content"] == f"<{text}> {{literal}} Q?"


async def test_prompts_and_labels_that_are_no_texts_are_json(service):
    service.script(said("Score: 5"))
    messages = [{"role": "user", "content": "Kdo?"}]
    await score(service, responded("x", {"a": None}, prompt=messages))
    assert (
        service.asked[0]
        .body["messages"][0]["content"]
        .startswith('Question: [{"role": "user", "content": "Kdo?"}]\nReference: {"a": null}\n')
    )


@pytest.mark.parametrize(
    ("text", "score_range", "expected"),
    [
        ("Score: 1", [1, 5], 0.0),
        ("**Score:** 5", [1, 5], 1.0),
        ("The answer says 'Score: 5'.\nscore = 2", [1, 5], 0.25),
        ("Score: 3.5 / 5", [1, 5], 0.625),
        ("Score: -2", [-5, 5], 0.3),
        ("Score: 1", [5, 1], 1.0),
    ],
)
async def test_the_last_score_counts_and_the_range_becomes_0_to_1(service, text, score_range, expected):
    service.script(said(text))
    sample = responded("x", "y")
    assert await score(service, sample, score_range=score_range) == pytest.approx(expected, abs=1e-12)
    assert sample.rewards["judge/unscored"] == 0.0


async def test_a_pattern_of_ones_own(service):
    service.script(said("Score: 5 [[2]]"))
    assert await score(service, responded("x", "y"), score=r"\[\[(\d)\]\]") == 0.25


UNSCORED = ["", None, "I cannot say.", "Score: high", "Score: 0", "Score: 6", "Score: 1e9"]


@pytest.mark.parametrize("text", UNSCORED, ids=repr)
async def test_an_answer_without_a_score_is_asked_for_again_and_counted(service, text):
    service.script(said(text), said(text), said("Score: 2"))
    sample = responded("x", "y")
    assert await score(service, sample) == 0.25
    assert sample.rewards == {"judge": 0.25, "judge/unscored": 2.0} and len(service.asked) == 3


async def test_after_all_attempts_it_is_an_error_or_what_the_recipe_says(service):
    service.script(said("I like it."))
    with pytest.raises(
        RunError,
        match=r"sample policy/g0/t0\.b0@0: judgy at http://.*/v1/chat/completions gave no score from 1 to 5 in 3 answers; "
        r"the last ends 'I like it\.'\. Mend the template",
    ):
        await score(service, responded("x", "y"))
    assert len(service.asked) == 3
    sample = responded("x", "y")
    assert await score(service, sample, unscored=0.5) == 0.5 and sample.rewards == {"judge": 0.5, "judge/unscored": 3.0}


async def test_a_score_pattern_that_takes_for_ever_is_given_up(service):
    service.script(said("a" * 60 + "b"))
    with pytest.raises(RunError, match=r"policy/g0/t0.*was not done with 61 characters within 0\.5 s"):
        await score(service, responded("x", "y"), score=r"((?:a|aa)+)$", timeout_s=0.5)


@pytest.mark.parametrize(
    "answer", [1.0, {}, {"choices": []}, {"choices": [{"text": "Score: 3"}]}, said(3), [], {"choices": [None]}], ids=repr
)
async def test_no_chat_completion(service, answer):
    service.script(answer)
    with pytest.raises(DataError, match=r"policy/g0/t0.*/v1/chat/completions answered no chat completion: .*; is base_url right\?"):
        await score(service, responded("x", "y"))


async def test_a_judge_that_is_down_is_no_fault_of_the_policy(service):
    service.script(Raw(503))
    with pytest.raises(InfrastructureFailure, match=r"/v1/chat/completions failed 3 times, last: HTTP 503"):
        await score(service, responded("x", "y"), unscored=0.0)


async def test_a_sample_without_the_label_that_the_template_names(service):
    service.script(said("Score: 3"))
    with pytest.raises(DataError, match=r"sample policy/g0/t0\.b0@0 has no label, which the template of reward judge names"):
        await score(service, responded("x"))
    assert service.asked == [] and await score(service, responded("x"), template="{response}") == 0.5


# ---- before anything is asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"template": "Is {answer} good?"}, r"names \{answer\}\..*It may name \{prompt\}, \{response\}, \{label\}"),
        ({"template": "Is {respones} good?"}, r"names \{respones\}\. Did you mean 'response'\?"),
        ({"template": "Is {response.upper} good?"}, r"names \{response\.upper\}"),
        ({"template": "{response!r}"}, r"names \{response\}|names"),
        ({"template": "{response:>9}"}, "names"),
        ({"template": "Is it good? {prompt}"}, r"does not name \{response\}"),
        ({"template": "Is {response} {good?"}, "a literal brace is doubled"),
        ({"template": None}, "give template or template_file, one of them"),
        ({"template_file": "x"}, "give template or template_file, one of them"),
        ({"score_range": [3, 3]}, "give the worst and the best score"),
        ({"score_range": [0, float("inf")]}, "give the worst and the best score"),
        ({"score": "Score: [0-9]"}, "has 0 groups"),
        ({"request": {"stream": True, "n": 1}}, "request sets stream, which the reward does itself"),
        ({"unscored": float("nan")}, "finite"),
        ({"base_url": "api.openai.com/v1"}, "is no URL"),
        ({"api_key": "sk-secret"}, "Extra inputs are not permitted"),
    ],
)
def test_options_that_make_no_sense_are_found_when_they_are_read(given, said):
    with pytest.raises(ValidationError, match=said):
        judge(None, **given)


async def test_a_template_from_a_file(service, tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", str(tmp_path))
    (tmp_path / "judge.txt").write_text("Je {response} správně?")
    made = {"template": None, "template_file": "${HERE}/judge.txt"}
    assert judge(None, **made).problems(None) == []
    service.script(said("Score: 3"))
    await score(service, responded("to"), **made)
    assert service.asked[0].body["messages"][0]["content"] == "Je to správně?"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"\xff\xfe{response}", "cannot be read"), (b"Is it good?", r"the template in .*judge\.txt does not name")],
)
def test_a_template_file_that_will_not_do_is_a_problem_of_the_recipe(tmp_path, content, said):
    path = tmp_path / "judge.txt"
    if content is not None:
        path.write_bytes(content)
    made = judge(None, template=None, template_file=str(path))
    [problem] = made.problems(None)
    with pytest.raises(ConfigError, match=said) as found:
        made.build(CONTEXT)
    assert str(found.value) == problem
