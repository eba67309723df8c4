"""The client of a SGLang server against a fake one that misbehaves: every fault is an error that names the server, the call and the log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.fake_sglang import DROP, SILENCE, FakeServer

from miles_core.errors import ConfigError, DataError, InfrastructureFailure, RunError
from miles_core.protocols import SamplingParams
from miles_rollout.sglang.client import Deadlines, SglangClient
from miles_rollout.sglang.payload import Request
from miles_rollout.sglang.shape import ModelShape

MODEL = ModelShape(
    vocab_size=8,
    layers=3,
    moe_layers=(0, 2),
    experts=4,
    top_k=2,
    tied=False,
    end_of_text=frozenset(),
    weights={},
    architectures=(),
    fields={},
    positions=None,
)
TOKENS = np.array([1, 2, 3], np.int32)


@pytest.fixture
async def fake() -> AsyncIterator[FakeServer]:
    async with FakeServer(layers=3).running() as server:
        server.version = "4"
        yield server


@pytest.fixture
async def client(fake: FakeServer) -> AsyncIterator[SglangClient]:
    client = SglangClient("server 0", fake.url, "key", MODEL, Deadlines(generate_s=60, control_s=60), lambda: "Its log is here.")
    yield client
    await client.close()


async def generate(client: SglangClient, **changes: Any) -> Any:
    return await client.generate(TOKENS, SamplingParams(4, **changes), 4)


async def test_a_generation_is_parsed(client: SglangClient, fake: FakeServer):
    routing = np.arange(6 * 3 * 2).reshape(6, 3, 2) % 4
    fake.overrides["/generate"] = lambda body, usual: with_meta(usual, routed_experts=encoded(routing))
    generated = await client.generate(TOKENS, SamplingParams(9, temperature=0.5), 4)
    assert generated.tokens.tolist() == [3, 3, 3, 3] and generated.tokens.dtype == np.int32
    assert generated.logprobs.tolist() == [-1, -2, -3, -4] and generated.logprobs.dtype == np.float32
    assert generated.versions.tolist() == [4] * 4 and generated.finish == "length" and generated.support is None
    assert generated.routing.dtype == np.uint8 and np.array_equal(generated.routing, routing[:, [0, 2]])  # layer 1 has no experts
    _, body = fake.seen[0]
    assert body["input_ids"] == [1, 2, 3] and body["sampling_params"]["max_new_tokens"] == 4
    assert (body["sampling_params"]["top_k"], body["sampling_params"]["temperature"]) == (-1, 0.5)


async def test_versions_change_within_a_generation(client: SglangClient, fake: FakeServer):
    spans = [{"version": "4", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 4}]
    fake.overrides["/generate"] = lambda body, usual: with_meta(usual, weight_versions=spans)
    assert (await generate(client)).versions.tolist() == [4, 7, 7, 7]


@pytest.mark.parametrize("restriction", [{"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
async def test_a_restricted_support_is_asked_for_and_its_logprobs_taken(restriction: Any, client: SglangClient, fake: FakeServer):
    generated = await generate(client, **restriction)
    assert generated.support == [[3, 5]] * 4 and generated.logprobs.tolist() == [-0.5] * 4
    assert fake.seen[0][1]["return_sampling_mask"] is True


def with_meta(usual: dict[str, Any], **meta: Any) -> dict[str, Any]:
    return usual | {"meta_info": {k: v for k, v in (usual["meta_info"] | meta).items() if v is not None}}


def encoded(routing: np.ndarray) -> str:
    import base64

    return base64.b64encode(routing.astype("<i4").tobytes()).decode()


BAD_ANSWERS: dict[str, tuple[Any, str]] = {
    "truncated JSON": (lambda b, u: json.dumps(u).encode()[:-20], r"bytes that are no JSON"),
    "no object": (b"null", r"cannot be right"),
    "HTML": (b"<html>", r"bytes that are no JSON"),
    "HTTP 500": ((500, {"error": {"message": "out of memory"}}), r"failed in /generate \(HTTP 500\): out of memory"),
    "HTTP 429": ((429, {"error": {"message": "too busy"}}), r"failed in /generate \(HTTP 429\): too busy"),
    "HTTP 408": ((408, {"error": {"message": "too slow"}}), r"failed in /generate \(HTTP 408\): too slow"),
    "connection dropped": (DROP, r"broke off /generate"),
    "no logprobs": (lambda b, u: with_meta(u, output_token_logprobs=None), r"no 'output_token_logprobs'"),
    "fewer logprobs": (lambda b, u: with_meta(u, output_token_logprobs=[[-1.0, 3, None]]), r"of 1 tokens, which are not the 4"),
    "logprobs of others": (lambda b, u: with_meta(u, output_token_logprobs=[[-1.0, 2, None]] * 4), r"which are not the 4"),
    "NaN": (lambda b, u: with_meta(u, output_token_logprobs=[[float("nan"), 3, None]] * 4), r"not finite"),
    "null": (lambda b, u: with_meta(u, output_token_logprobs=[[None, 3, None]] * 4), r"not finite"),
    "above 0": (lambda b, u: with_meta(u, output_token_logprobs=[[0.5, 3, None]] * 4), r"above 0"),
    "id out of range": (lambda b, u: u | {"output_ids": [3, 8, 3, 3]}, r"token 8 at 1 of its output is outside the vocabulary of 8"),
    "too many": (lambda b, u: u | {"output_ids": [3] * 5}, r"5 tokens where 1 to 4 were asked for"),
    "none": (lambda b, u: u | {"output_ids": []}, r"0 tokens where 1 to 4"),
    "spans short": (lambda b, u: with_meta(u, weight_versions=[{"version": "4", "start": 0, "end": 3}]), r"up to token 3 of 4"),
    "spans with a gap": (lambda b, u: with_meta(u, weight_versions=[{"version": "4", "start": 1, "end": 4}]), r"do not cover its 4"),
    "no number": (lambda b, u: with_meta(u, weight_versions=[{"version": "default", "start": 0, "end": 4}]), r"do not cover"),
    "no spans": (lambda b, u: with_meta(u, weight_versions=None), r"no 'weight_versions'"),
    "no routing": (lambda b, u: with_meta(u, routed_experts=None), r"no 'routed_experts'"),
    "routing short": (lambda b, u: with_meta(u, routed_experts=encoded(np.zeros((5, 3, 2)))), r"30 routed experts, not those of 6 tokens"),
    "routing of 1 expert": (lambda b, u: with_meta(u, routed_experts=encoded(np.zeros((6, 3, 1)))), r"18 routed experts"),
    "expert out of range": (lambda b, u: with_meta(u, routed_experts=encoded(np.full((6, 3, 2), 4))), r"expert 4 or 4 of 4"),
    "routing no base64": (lambda b, u: with_meta(u, routed_experts="§"), r"cannot be right"),
    "unknown finish": (lambda b, u: with_meta(u, finish_reason={"type": "tired"}), r"finish reason 'tired'"),
    "its own fault": (
        lambda b, u: with_meta(u, finish_reason={"type": "abort", "status_code": 503, "message": "shutting down"}),
        r"shutting down",
    ),
}


@pytest.mark.parametrize("answer, message", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
async def test_what_cannot_be_right_is_an_infrastructure_failure(answer: Any, message: str, client: SglangClient, fake: FakeServer):
    fake.overrides["/generate"] = answer
    with pytest.raises(InfrastructureFailure, match=message) as failure:
        await generate(client)
    assert "server 0" in str(failure.value)


@pytest.mark.parametrize(
    "meta, message",
    [
        ({"output_token_sampling_mask": [[5]] * 4}, "not in its own support"),
        ({"output_token_sampling_mask": [[3]]}, "1 supports of 4 tokens"),
        ({"output_token_sampling_logprobs": [-0.1]}, "missing, not finite or above 0"),
    ],
)
async def test_supports_that_cannot_be_right(meta: Any, message: str, client: SglangClient, fake: FakeServer):
    fake.overrides["/generate"] = lambda body, usual: with_meta(usual, **meta)
    with pytest.raises(InfrastructureFailure, match=message):
        await generate(client, top_k=2)


@pytest.mark.parametrize(
    "status, error, message",
    [
        (400, DataError, r"server 0 refuses /generate \(HTTP 400\): too long"),
        (401, ConfigError, r"does not take the API key"),
        (404, ConfigError, r"has no /generate: it is no SGLang server, or one of another release"),
    ],
)
async def test_refusals(status: int, error: type[Exception], message: str, client: SglangClient, fake: FakeServer):
    fake.overrides["/generate"] = (status, {"error": {"message": "too long"}})
    with pytest.raises(error, match=message):
        await generate(client)


async def test_logits_that_are_not_finite_are_the_policys(client: SglangClient, fake: FakeServer):
    fake.overrides["/generate"] = lambda b, u: with_meta(u, finish_reason={"type": "stop", "matched": "NaN happened"})
    with pytest.raises(RunError, match="not finite"):
        await generate(client)


async def test_silence_has_a_deadline_and_aborts_the_request(fake: FakeServer):
    client = SglangClient("server 0", fake.url, None, MODEL, Deadlines(generate_s=0.2, control_s=60), lambda: "Its log is here.")
    await client.version()  # connected: the request arrives before anybody could be tired of waiting
    fake.seen.clear()
    fake.overrides["/generate"] = SILENCE
    with pytest.raises(InfrastructureFailure, match=r"server 0 did not answer /generate within 0.2 s. Its log is here."):
        await generate(client)
    assert fake.seen[-1] == ("/abort_request", {"rid": fake.seen[0][1]["rid"]})
    await client.close()


async def test_nobody_there(fake: FakeServer):
    client = SglangClient("server 0", "http://127.0.0.1:9", None, MODEL, Deadlines(5, 5), lambda: "Its log is here.")
    with pytest.raises(InfrastructureFailure, match=r"server 0 broke off /generate: ConnectError.*Its log is here."):
        await generate(client)
    assert not await client.alive()
    await client.close()


async def test_cancelling_aborts_that_request_and_no_other(client: SglangClient, fake: FakeServer):
    fake.abortable = True
    tasks = [asyncio.create_task(generate(client)) for _ in range(2)]
    while len(fake.waiting) < 2:
        await fake.arrived.wait()
        await asyncio.sleep(0)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    aborted = [body["rid"] for path, body in fake.seen if path == "/abort_request"]
    ids = [body["rid"] for path, body in fake.seen if path == "/generate"]
    assert len(aborted) == 1 and sum(i.startswith(aborted[0]) for i in ids) == 1 and not tasks[1].done()
    await client.abort()
    assert (await tasks[1]).finish == "abort"


async def test_request_ids_are_of_one_width_and_differ(client: SglangClient, fake: FakeServer):
    for _ in range(20):
        await generate(client)
    ids = [body["rid"] for _, body in fake.seen]
    assert len(set(ids)) == 20 and len({len(i) for i in ids}) == 1


@pytest.mark.parametrize("tokens", [[1, 8], [-1], []])
async def test_ids_that_would_kill_the_server_are_not_sent(tokens: list[int], client: SglangClient, fake: FakeServer):
    with pytest.raises(DataError, match=r"not sent to server 0"):
        await client.generate(np.array(tokens, np.int32), SamplingParams(4), 4)
    assert fake.seen == []


@pytest.mark.parametrize(
    "call, path",
    [
        (lambda c: c.begin_update(), "/begin_weight_update"),
        (lambda c: c.update_bucket(Request(b"weights"), 1), "/update_weights_from_tensor"),
        (lambda c: c.set_version(3), "/update_weight_version"),
        (lambda c: c.checksum(), "/weights_checker"),
    ],
)
@pytest.mark.parametrize("answer", [{"success": False, "message": "because"}, (400, {"success": False, "message": "because"})])
async def test_control_calls_that_fail_say_why(
    call: Callable[[SglangClient], Any], path: str, answer: Any, client: SglangClient, fake: FakeServer
):
    fake.overrides[path] = answer
    with pytest.raises(RunError, match=f"server 0 .*{path}.*because"):
        await call(client)


REPEATED: list[tuple[str, Callable[[SglangClient], Any]]] = [
    ("/model_info", lambda c: c.info()),
    ("/server_info", lambda c: c.info()),
    ("/model_info", lambda c: c.version()),
    ("/weights_checker", lambda c: c.checksum()),
    ("/update_weight_version", lambda c: c.set_version(5)),
    ("/update_weights_from_disk", lambda c: c.load_from_disk(Path("/somewhere"))),
    ("/pause_generation", lambda c: c.pause("retract")),
    ("/continue_generation", lambda c: c.continue_()),
    ("/abort_request", lambda c: c.abort()),
]
ONCE: list[tuple[str, Callable[[SglangClient], Any]]] = [
    ("/begin_weight_update", lambda c: c.begin_update()),
    ("/update_weights_from_tensor", lambda c: c.update_bucket(Request(b"weights"), 1)),
    ("/end_weight_update", lambda c: c.end_update()),
    ("/generate", generate),
]


@pytest.mark.parametrize("answer", [(500, {}), DROP], ids=["HTTP 500", "connection dropped"])
@pytest.mark.parametrize("path, call", REPEATED)
async def test_a_hiccup_in_what_may_be_repeated_is_survived(
    path: str, call: Any, answer: Any, client: SglangClient, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("miles_rollout.sglang.client.PAUSE_SECONDS", 0)
    fake.fail_once(path, answer)
    await call(client)
    assert fake.paths().count(path) == 2
    fake.overrides[path] = answer
    with pytest.raises(InfrastructureFailure, match=path):
        await call(client)


@pytest.mark.parametrize("path, call", ONCE)
async def test_what_may_not_be_repeated_is_asked_once(path: str, call: Any, client: SglangClient, fake: FakeServer):
    fake.fail_once(path, (500, {}))
    with pytest.raises(InfrastructureFailure, match=rf"failed in {path} \(HTTP 500\)"):
        await call(client)
    assert fake.paths().count(path) == 1


async def test_silence_is_not_waited_for_again(fake: FakeServer):
    client = SglangClient("server 0", fake.url, None, MODEL, Deadlines(generate_s=60, control_s=0.2), lambda: "Its log is here.")
    await generate(client)  # connected
    fake.seen.clear()
    fake.overrides["/weights_checker"] = SILENCE
    with pytest.raises(InfrastructureFailure, match=r"did not answer /weights_checker within 0.2 s"):
        await client.checksum()
    assert fake.paths() == ["/weights_checker"]
    await client.close()


async def test_info_and_scores(client: SglangClient, fake: FakeServer):
    info = await client.info()
    assert (info.release, info.version, info.max_length, info.records_routing) == ("0.5.23", "4", 100, True)
    fake.overrides["/server_info"] = {"version": "0.5.23"}
    with pytest.raises(InfrastructureFailure, match=r"/server_info with what cannot be right: no 'dtype'"):
        await client.info()
    fake.overrides["/generate"] = {"meta_info": {"input_token_logprobs": [[None, 1, None], [-1.5, 2, None], [-2.5, 3, None]]}}
    assert np.array_equal(await client.score(TOKENS), np.array([np.nan, -1.5, -2.5], np.float32), equal_nan=True)
    fake.overrides["/generate"] = {"meta_info": {"input_token_logprobs": [[None, 1, None]]}}
    with pytest.raises(InfrastructureFailure, match="of 1 tokens"):
        await client.score(TOKENS)


@pytest.mark.parametrize(
    "config, said",
    [
        (None, "has no config.json"),
        ({"model_type": "perceptron"}, r"config\.json says model_type 'perceptron', which transformers .* does not know"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 0}, "not how many a token goes to"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(config: dict[str, Any] | None, said: str, tmp_path: Path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=said):
        ModelShape.read(tmp_path)
