"""``reward: http`` over a real server: what is sent, what may come back, and what happens when it breaks."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from fixtures.rewards import END, config, responded, scorer
from fixtures.services import HangUp, Raw, Service
from pydantic import ValidationError

from miles_core.config import Deadlines
from miles_core.errors import ConfigError, DataError, InfrastructureFailure, RunError
from miles_core.plugins import config_class
from miles_core.rewards import endpoint

pytestmark = pytest.mark.usefixtures("at_once")


async def scored(service, *samples, **given):
    """Rewards of samples by the service."""
    scoring = scorer(svc=config("http", url=f"{service.url}/score", **given))
    await (scoring.score_batch if given.get("per") == "batch" else scoring.score_group)(list(samples))
    return [s.reward for s in samples]


# ---- what is sent --------------------------------------------------------------------------------------------------------


async def test_a_service_gets_text_label_and_metadata(service):
    service.script(0.5)
    assert await scored(service, responded(f"Čau{END}", {"a": [1]}, level=3)) == [0.5]
    [asked] = service.asked
    assert asked.path == "/score" and "Authorization" not in asked.headers
    assert asked.body == {
        "id": "policy/g0/t0.b0@0",
        "prompt": "Q?",
        "response": "Čau",
        "label": {"a": [1]},
        "status": "completed",
        "metadata": {"level": 3},
    }


async def test_tokens_are_sent_if_asked_for_and_a_key_from_the_environment(service, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    service.script(1)
    await scored(service, responded("x"), tokens=True, key_variable="MY_KEY")
    [asked] = service.asked
    assert asked.body["tokens"] == [5, 6, 10, 7] and asked.body["sampled"] == [False, False, True, True]
    assert asked.headers["Authorization"] == "Bearer secret"


async def test_what_is_no_json_is_never_sent(service):
    service.script(1)
    for bad in (object(), float("nan")):
        with pytest.raises(DataError, match=r"sample policy/g0/t0\.b0@0: what is sent to http://.*/score must be JSON"):
            await scored(service, responded("x", level=bad))
    assert service.asked == []


# ---- what comes back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [1, 0.25, {"reward": 0.25}, {"reward": -3, "parts": {}}])
async def test_a_number_or_an_object(service, answer):
    service.script(answer)
    expected = float(answer["reward"] if isinstance(answer, dict) else answer)
    assert await scored(service, responded("x")) == [expected]


async def test_parts_are_named_after_the_reward_and_not_added(service):
    service.script({"reward": 0.75, "parts": {"style": 0.5, "facts": 1}})
    sample = responded("x")
    assert await scored(service, sample, weight=2) == [1.5]
    assert sample.rewards == {"svc": 0.75, "svc/style": 0.5, "svc/facts": 1.0}


@pytest.mark.parametrize("per", ["group", "batch"])
async def test_a_group_or_batch_is_one_request(service, per):
    service.script([0.5, {"reward": 1, "parts": {"style": 0.25}}, 3])
    samples = [responded(c, trajectory=i) for i, c in enumerate("abc")]
    assert await scored(service, *samples, per=per) == [0.5, 1.0, 3.0]
    [asked] = service.asked
    assert [s["response"] for s in asked.body["samples"]] == ["a", "b", "c"]
    assert [s.rewards.get("svc/style") for s in samples] == [None, 0.25, None]


BAD = [
    Raw(body=b"NaN"),
    Raw(body=b"1e999"),
    Raw(body=b'{"reward": NaN}'),
    Raw(body=b'{"reward": 1, "parts": {"a": Infinity}}'),
    "1",
    True,
    None,
    [1],
    {"score": 1},
    {"reward": 1, "part": {}},
    {"reward": 1, "parts": [1]},
    {"reward": None},
]


@pytest.mark.parametrize("answer", BAD, ids=repr)
async def test_another_answer_names_url_and_sample(service, answer):
    service.script(answer)
    with pytest.raises(DataError, match=r"reward http of sample policy/g0/t0\.b0@0: http://.*/score answered .*; expected a finite number"):
        await scored(service, responded("x"))
    assert len(service.asked) == 1  # it would say so again


@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b'{"reward": 1', b"\xff\xfe"])
async def test_no_json_names_url_and_sample(service, body):
    service.script(Raw(body=body))
    with pytest.raises(DataError, match=rf"sample policy/g0/t0.*http://.*/score answered {len(body)} bytes that are no JSON"):
        await scored(service, responded("x"))


@pytest.mark.parametrize(
    ("answer", "found"),
    [([1.0], "a list of 1"), ([], "a list of 0"), ([1, 2, 3], "a list of 3"), (1.0, r"1\.0"), ({"rewards": [1, 2]}, "{'rewards'")],
)
async def test_a_group_needs_one_answer_for_each(service, answer, found):
    service.script(answer)
    with pytest.raises(DataError, match=rf"t0\.b0@0 and 1 more: http://.* answered {found}.*; expected a list with a reward for each of 2"):
        await scored(service, responded("a"), responded("b", trajectory=1), per="group")


async def test_the_one_of_a_group_that_is_wrong_is_named(service):
    service.script([1.0, "no"])
    with pytest.raises(DataError, match=r"sample policy/g0/t1\.b0@0: http://.* answered 'no'"):
        await scored(service, responded("a"), responded("b", trajectory=1), per="group")


# ---- what breaks ---------------------------------------------------------------------------------------------------------

PASSING = [Raw(500), Raw(502, b"bad gateway"), Raw(503), Raw(429), Raw(408), HangUp(), Raw(200, b"1", length=100)]


@pytest.mark.parametrize("fault", PASSING, ids=repr)
async def test_what_may_pass_is_asked_again(service, fault):
    service.script(fault, fault, 0.5)
    assert await scored(service, responded("x"), attempts=3) == [0.5]
    assert len(service.asked) == 3 and len({json.dumps(a.body) for a in service.asked}) == 1


@pytest.mark.parametrize("fault", PASSING, ids=repr)
async def test_after_all_attempts_it_is_no_fault_of_the_policy(service, fault):
    service.script(fault)
    sample = responded("x")
    with pytest.raises(InfrastructureFailure, match=r"policy/g0/t0\.b0@0: http://.*/score failed 2 times, last: .*Look at the service"):
        await scored(service, sample, attempts=2)
    assert len(service.asked) == 2 and sample.reward is None


async def test_nobody_listens():
    dead = Service()
    dead.close()
    with pytest.raises(InfrastructureFailure, match=r"failed 2 times, last: ConnectError"):
        await scored(dead, responded("x"), attempts=2)


async def test_a_batch_cannot_be_issued_again(service):
    service.script(Raw(500))
    with pytest.raises(RunError, match=r"failed 1 times, last: HTTP 500"):
        await scored(service, responded("x"), attempts=1, per="batch")


async def test_silence_ends_at_the_deadline_of_a_request(service):
    release, asked = threading.Event(), []

    def answer(request):
        asked.append(request)
        if len(asked) == 1:
            release.wait(100)
        return 0.5

    service.answer = answer
    assert await scored(service, responded("x"), attempts=20, timeout_s=0.3) == [0.5]  # the second, or a later one on a busy machine
    service.answer = lambda request: release.wait(100)
    with pytest.raises(InfrastructureFailure, match=r"last: no answer within 0\.3 s\. Look at the service; raise timeout_s if it is slow"):
        await scored(service, responded("x"), attempts=1, timeout_s=0.3)
    release.set()


async def test_the_pauses_double_up_to_a_bound_or_are_what_the_service_asks_for(service, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 1.0)
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr(endpoint, "asyncio", type("Asyncio", (), {**vars(asyncio), "sleep": staticmethod(sleep)}))
    service.script(*[Raw(500)] * 7, 0.5)
    await scored(service, responded("x"), attempts=8)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    pauses.clear()
    service.script(
        Raw(429, headers={"Retry-After": "7"}), Raw(503, headers={"Retry-After": "9999"}), Raw(503, headers={"Retry-After": "soon"}), 1
    )
    await scored(service, responded("x"), attempts=4)
    assert pauses == [7, 30, 4]


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (Raw(401, b"who?"), ConfigError, r"does not take a request without a key; name its variable in key_variable \(HTTP 401\): 'who\?'"),
        (Raw(403), ConfigError, "does not take"),
        (Raw(404), ConfigError, r"there is no service at http://.*/score \(HTTP 404\)"),
        (Raw(307, headers={"Location": "/elsewhere"}), ConfigError, "there is no service"),
        (Raw(422, b"label?"), DataError, r"refuses what is sent \(HTTP 422\): 'label\?'"),
    ],
)
async def test_a_refusal_is_said_at_once(service, fault, error, said):
    service.script(fault)
    with pytest.raises(error, match=rf"sample policy/g0/t0\.b0@0: .*{said}"):
        await scored(service, responded("x"))
    assert len(service.asked) == 1


async def test_a_key_that_is_refused_is_named_by_its_variable_only(service, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    service.script(Raw(401))
    with pytest.raises(ConfigError, match="the key in the environment variable MY_KEY") as found:
        await scored(service, responded("x"), key_variable="MY_KEY")
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("status", [200, 401, 404, 422, 500])
@pytest.mark.parametrize("told", ['{"detail": "KEY"}', "x" * 190 + "KEY", "KEY", '[["KEY"]]'])
async def test_a_key_that_the_service_says_again_is_not_shown(service, monkeypatch, status, told):
    monkeypatch.setenv("MY_KEY", "sk-secret-12345")
    service.script(Raw(status, told.replace("KEY", "Bearer sk-secret-12345").encode()))
    for per in ("sample", "group"):
        with pytest.raises(Exception, match="reward http of sample policy/g0") as found:
            await scored(service, responded("x"), key_variable="MY_KEY", attempts=1, per=per)
        assert "sk-" not in str(found.value) and "<MY" in str(found.value)


@pytest.mark.parametrize("reward", ["http", "judge"])
def test_the_defaults_let_a_hanging_service_be_named_before_the_group_s_deadline(reward):
    """A group is played three times; what is left is for its sampling."""
    fields = config_class("reward", reward).model_fields
    attempts, timeout_s = fields["attempts"].default, fields["timeout_s"].default
    pauses = sum(min(endpoint.LONGEST_PAUSE_S, 2.0**n) for n in range(attempts - 1))
    assert 3 * (attempts * timeout_s + pauses) <= Deadlines().group * 0.6


# ---- many at once --------------------------------------------------------------------------------------------------------


async def test_so_many_at_once_and_no_more_and_nobody_s_wait_counts(service):
    """Three at a time get through a gate that opens for three; all take longer together than one may."""
    now, most, lock, gate = 0, 0, threading.Lock(), threading.Barrier(3)

    def answer(asked):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        gate.wait(10)
        with lock:
            now -= 1
        gate.wait(10)
        return 1.0

    service.answer = answer
    samples = [responded("x", trajectory=i) for i in range(12)]
    assert await scored(service, *samples, concurrency=3) == [1.0] * 12
    assert most == 3


async def test_who_waits_for_a_turn_at_a_service_that_hangs_fails_with_it(service):
    """Else the groups' deadline would come first, and name the rollout. Who asks afterwards is a new try."""
    release = threading.Event()
    service.asked.clear()
    service.answer = lambda asked: release.wait(30) and 0.5
    scoring = scorer(svc=config("http", url=service.url, concurrency=2, attempts=1, timeout_s=1.0))
    groups = [scoring.score_group([responded("x", trajectory=i)]) for i in range(6)]
    failures = await asyncio.gather(*groups, return_exceptions=True)
    assert all(isinstance(failure, InfrastructureFailure) for failure in failures), failures
    assert len(service.asked) == 2
    assert sum("hangs: nobody got an answer in 1 attempts of 1 s while" in str(failure) for failure in failures) == 4
    release.set()
    again = responded("x")
    await scoring.score_group([again])
    assert again.reward == 0.5


async def test_one_request_that_hangs_is_no_service_that_hangs(service):
    """Trajectory 0 gets no answer, 1 one after a while, 2 one when 3 is asked: which waited for its turn all the time."""
    release, third = threading.Event(), threading.Event()

    def answer(asked):
        number = int(asked.body["id"].split("/t")[1][0])
        if number == 0:
            release.wait(30)
        elif number == 1:
            release.wait(1.0)
        elif number == 2:
            third.wait(30)
        else:
            third.set()
        return 1.0

    service.answer = answer
    scoring = scorer(svc=config("http", url=service.url, concurrency=2, attempts=1, timeout_s=2.0))
    samples = [responded("x", trajectory=i) for i in range(4)]
    await asyncio.gather(*(scoring.score_group([sample]) for sample in samples), return_exceptions=True)
    release.set()
    assert [sample.reward for sample in samples] == [None, 1.0, 1.0, 1.0]


async def test_connections_are_shared_while_they_are_used_and_closed_after(service):
    import psutil

    def connections():
        port = int(service.url.rsplit(":", 1)[1])
        return [c for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port and c.status == "ESTABLISHED"]

    ports = set()

    def answer(asked):
        ports.update(c.laddr.port for c in connections())
        return 1.0

    service.answer = answer
    scoring = scorer(svc=config("http", url=service.url, concurrency=2))
    await scoring.score_group([responded("x", trajectory=i) for i in range(10)])
    assert 1 <= len(ports) <= 2 and connections() == []
    await scoring.score_group([responded("y")])
    assert connections() == [] and asyncio.all_tasks() == {asyncio.current_task()}


async def test_one_that_fails_takes_the_others_back(service):
    release = threading.Event()

    def answer(asked):
        if asked.body["id"].startswith("policy/g0/t0."):
            return "bad"
        release.wait(10)
        return 1.0

    service.answer = answer
    with pytest.raises(DataError, match="answered 'bad'"):
        await scored(service, *[responded("x", trajectory=i) for i in range(4)])
    assert asyncio.all_tasks() == {asyncio.current_task()}
    release.set()


# ---- before anything is sent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:9000/score", "is no URL of a service; write http://host:port/path"),
        ("localhost/score", "is no URL"),
        ("ftp://host/score", "is no URL"),
        ("http:///score", "is no URL"),
        ("http://me:secret@host/score", "holds no password"),
        ("http://host/score?api_key=secret", "holds no '\\?' or '#'"),
        ("http://host/score#secret", "holds no '\\?' or '#'"),
        ("http://host:99999/score", "(?i)port"),
        ("http://ho st/score", "is no URL"),
    ],
)
def test_a_url_that_is_none(url, said):
    with pytest.raises(ValidationError, match=said) as found:
        config("http", url=url)
    assert "secret" not in found.value.errors()[0]["msg"]


def test_a_key_that_is_not_set_is_missing(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    made = config("http", url="http://host", key_variable="NOT_SET")
    assert made.missing() == ["the environment variable NOT_SET, which key_variable names, is not set; export it"]
    with pytest.raises(ConfigError, match="the environment variable NOT_SET"):
        scorer(svc=made)


@pytest.mark.parametrize("key", ["secret\n", " secret", "s\u00e9cret"])
def test_a_key_that_cannot_be_sent_is_not_shown(key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    [sentence] = config("http", url="http://host", key_variable="MY_KEY").missing()
    assert "MY_KEY holds" in sentence and "cret" not in sentence


async def test_without_the_library_it_says_which_extra(service, monkeypatch):
    monkeypatch.setattr(endpoint, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"httpx is not installed; pip install 'miles-core\[rewards\]'"):
        scorer(svc=config("http", url=service.url))
