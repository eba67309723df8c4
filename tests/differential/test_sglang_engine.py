"""The SGLang engine over real servers beside plain transformers: what is SGLang's own and not in the engines' conformance suite."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
from fixtures.engines import Reference, attached, generation_matches, model_path

from miles_core.errors import ConfigError, DataError, InfrastructureFailure, RunError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, GenerateRequest, SamplingParams
from miles_core.tokenizers import load_tokenizer
from miles_rollout.sglang import payload, updates
from miles_rollout.sglang.client import Deadlines, SglangClient
from miles_rollout.sglang.group import Group
from miles_rollout.sglang.shape import ModelShape

T = TypeVar("T")

BUCKET = payload.Bucket(torch.zeros(1 << 20, dtype=torch.uint8))
BUCKET.add("w", torch.zeros(1 << 18))


def built(path: Path, directory: Path, **options: Any) -> Any:
    config = config_class("rollout_engine", "sglang").model_validate({"use": "sglang", "dtype": "float32", **options})
    return config.build(BuildContext(directory, "test", 0, model="policy", model_path=path, tokenizer=load_tokenizer(path)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_path("moe", tmp_path_factory)


@pytest.fixture(scope="module")
def reference(path: Path) -> Reference:
    return Reference(path)


@pytest.fixture
async def engine(path: Path, tmp_path: Path, sglang_moe_server: Any) -> AsyncIterator[Any]:
    """Over the session's server, which holds version 0 of the model."""
    engine = built(path, tmp_path, **attached(sglang_moe_server))
    await engine.start()
    await engine.load_weights(path, 0)
    yield engine
    await engine.close()


@pytest.fixture
async def client(path: Path, sglang_moe_server: Any) -> AsyncIterator[SglangClient]:
    """Of the same server."""
    client = SglangClient(
        "server",
        sglang_moe_server.url,
        sglang_moe_server.token,
        ModelShape.read(path),
        Deadlines(60, 60),
        lambda: sglang_moe_server.log_tail(9),
    )
    yield client
    await client.close()


def ask(tokens: Any, *, session: str = "s", routing_start: int = 0, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(session, np.asarray(tokens, np.int32), SamplingParams(**{"max_tokens": 16, **sampling}), 1, routing_start)


async def busy(server: Any) -> int:
    """Requests the server is running or keeps waiting."""

    def get() -> int:
        question = urllib.request.Request(f"{server.url}/v1/loads", headers={"Authorization": f"Bearer {server.token}"})
        with urllib.request.urlopen(question, timeout=20) as answer:
            (load,) = json.load(answer)["loads"]
        return load["num_running_reqs"] + load["num_waiting_reqs"]

    return await asyncio.to_thread(get)


async def until(condition: Any, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        await asyncio.sleep(0.02)


async def again(generate: Callable[[], Awaitable[T]], enough: asyncio.Event) -> list[T]:
    """Generation after generation, the last of them the one that runs when it is enough: any may end early, but one is always running."""
    done = []
    while not enough.is_set():
        done.append(await generate())
    return done


async def test_a_publish_in_the_middle_of_generations(engine: Any, reference: Reference, sglang_moe_server: Any):
    """Every token has version, logprob and routing of the weights that sampled it; nothing recorded before is touched."""
    other = reference.perturbed()
    requests = [ask([2, 3, i % 7 + 2], session=f"s{i}", max_tokens=200, temperature=0.8) for i in range(12)]
    updated = asyncio.Event()
    tasks = [asyncio.create_task(again(partial(engine.generate, request), updated)) for request in requests]

    async def some_run() -> bool:
        return await busy(sglang_moe_server) > 2

    await until(some_run, "generations to run")
    await engine.update_weights(other.weights(), 1)
    updated.set()
    generations = await asyncio.gather(*tasks)
    both = [(r, g) for r, of_one in zip(requests, generations, strict=True) for g in of_one if set(g.versions.tolist()) == {0, 1}]
    assert both, "no generation was running when the weights changed"
    for request, generation in both:
        first = int((generation.versions == 0).sum())
        assert np.array_equal(generation.versions, np.repeat([0, 1], [first, len(generation.tokens) - first]))
        start, tokens = len(request.tokens), np.concatenate([request.tokens, generation.tokens])
        reference.agrees(request, generation, generation.versions == 0)
        other.agrees(request, generation, generation.versions == 1)
        rows = start + first - 1
        assert generation.routing is not None and len(generation.routing) == len(tokens) - 1
        reference.chose(generation.routing[:rows], tokens)
        other.chose(generation.routing[rows:], tokens, rows)


@pytest.mark.parametrize("by_value", ["update_weights", "broadcast_weights"])
async def test_weights_by_value_are_those_from_a_disk(
    by_value: str, engine: Any, reference: Reference, path: Path, tmp_path: Path, monkeypatch: Any
):
    """However they are cut into buckets; the server's own checksum over its fused parameters says so."""
    original, other = await engine.checksum(), reference.perturbed()
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    await engine.load_weights(tmp_path / "other", 1)
    from_disk = await engine.checksum()
    assert from_disk != original
    for version, size in ((2, updates.IN_REQUESTS.bucket_bytes), (3, 1 << 14)):
        await engine.load_weights(path, 0)
        assert await engine.checksum() == original
        monkeypatch.setattr(updates, "buckets", lambda weights, _, size=size: payload.buckets(weights, size))
        await getattr(engine, by_value)(other.weights(), version)
        assert engine.version == version and await engine.checksum() == from_disk
    request = ask([2, 3, 4])
    generation_matches(request, await engine.generate(request), other)


class Source:
    """A trainer that holds a reference's weights."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._reference.weights()

    async def export(self, directory: Path) -> None:
        self._reference.save(directory)


async def test_a_publish_through_a_process_group(engine: Any, reference: Reference, path: Path, tmp_path: Path):
    """Twice through one group; what arrived was compared with an export on a disk."""
    transport = config_class("weight_transport", "collective").model_validate({"use": "collective", "verify_every": 1})
    publisher = transport.build(BuildContext(tmp_path, "test", 0))
    for version, held in ((1, reference.perturbed()), (2, reference)):
        metrics = await publisher.publish(Source(held), [engine], version)
        assert metrics["verified"] == 1 and metrics["bytes"] == sum(tensor.nbytes for _, tensor in held.weights())
        request = ask([2, 3, 4])
        generation = await engine.generate(request)
        generation_matches(request, generation, held)
        assert set(generation.versions.tolist()) == {version}


@pytest.fixture
async def group(client: SglangClient) -> AsyncIterator[Group]:
    """With the one rank of the session's server."""
    group = Group(client, 1, 20)
    await group.join()
    yield group
    await group.leave(5)


async def test_a_rank_that_waits_for_weights_hears_that_we_are_gone(group: Group, client: SglangClient, engine: Any, reference: Reference):
    """Left alone it would wait for half an hour, and its server answer nothing."""
    await client.begin_update()
    waiting = asyncio.ensure_future(client.update_from_group(group._name, BUCKET, 60))
    assert not (await asyncio.wait({waiting}, timeout=0.5))[0]
    await group.leave(5)
    with pytest.raises(RunError, match="Failed to receive weights"):
        await waiting
    await client.end_update()
    await engine.broadcast_weights(reference.weights(), 3)
    request = ask([2, 3, 4])
    generation_matches(request, await engine.generate(request), reference)


async def test_our_end_hears_that_a_server_refused(group: Group, client: SglangClient, engine: Any):
    """No update was begun: it never takes what is sent."""
    with pytest.raises(RunError, match="must run between begin_weight_update"):
        await group.send(BUCKET)
    await group.leave(5)
    with pytest.raises(RunError, match="does not exist"):
        await client.leave_group(group._name, 5)


async def test_one_bit_shows_in_the_checksum(engine: Any, reference: Reference):
    weights = reference.weights()
    before = await engine.checksum()
    _, tensor = weights[-1]
    tensor.view(-1)[3] = torch.nextafter(tensor.view(-1)[3], torch.tensor(99.0))
    await engine.update_weights(weights, 1)
    changed = await engine.checksum()
    await engine.update_weights(reference.weights(), 2)
    assert changed != before == await engine.checksum()


async def test_what_does_not_fit_is_a_sentence_and_the_server_still_serves(engine: Any, reference: Reference, sglang_moe_server: Any):
    """Left to itself SGLang drops an unknown name silently and dies of a wrong shape."""
    before, weights = await engine.checksum(), dict(reference.weights())
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    for bad, message in (
        ({**weights, "model.layers.9.mlp.gate.weight": weights[name]}, r"'model.layers.9.mlp.gate.weight' is unknown"),
        ({**weights, name: weights[name][:, :-1]}, rf"{name}' is float32 \[64, 31\], the servers hold float32 \[64, 32\]"),
        ({n: t for n, t in weights.items() if n != name}, rf"1 weights are missing, the first is '{name}'"),
    ):
        with pytest.raises(DataError, match=message):
            await engine.update_weights(bad.items(), 5)
    assert sglang_moe_server.alive() and await engine.checksum() == before and engine.version == 0
    request = ask([2, 3, 4])
    generation_matches(request, await engine.generate(request), reference)


async def test_bad_ids_are_not_sent(engine: Any, client: SglangClient, sglang_moe_server: Any):
    size = ModelShape.read(engine._model_path).vocab_size
    for bad in ([size], [-1]):
        with pytest.raises(DataError, match="outside the vocabulary"):
            await engine.generate(ask(bad))
        with pytest.raises(DataError, match="not sent to server"):
            await client.generate(np.array(bad, np.int32), SamplingParams(4), 4)
    assert sglang_moe_server.alive() and len((await engine.generate(ask([size - 1]))).tokens) >= 1


async def test_cancelling_frees_the_server(engine: Any, sglang_moe_server: Any):
    requests, never = [ask([2, 3], session=f"s{i}", max_tokens=240) for i in range(24)], asyncio.Event()
    tasks = [asyncio.create_task(again(partial(engine.generate, request), never)) for request in requests]

    async def full() -> bool:
        return await busy(sglang_moe_server) >= 8

    async def idle() -> bool:
        return await busy(sglang_moe_server) == 0

    await until(full, "generations to run")
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, asyncio.CancelledError) for r in results)
    await until(idle, "the server to be idle")


async def test_an_abort_returns_what_there_is(client: SglangClient, engine: Any, sglang_moe_server: Any, reference: Reference):
    tokens = np.array([2, 3], np.int32)
    enough = asyncio.Event()
    tasks = [asyncio.create_task(again(lambda: client.generate(tokens, SamplingParams(240), 240), enough)) for _ in range(24)]

    async def full() -> bool:
        return await busy(sglang_moe_server) >= 20

    await until(full, "generations to run")
    enough.set()
    await client.abort()
    aborted = [g for of_one in await asyncio.gather(*tasks) for g in of_one if g.finish == "abort"]
    assert aborted
    for generated in aborted:
        n = len(generated.tokens)
        assert len(generated.logprobs) == len(generated.versions) == n and (n == 0 or generated.routing.shape == (n + 1, 2, 2))
    most = max(aborted, key=lambda g: len(g.tokens))
    reference.chose(most.routing, np.concatenate([tokens, most.tokens]))


async def test_scores_are_raw_logprobs(client: SglangClient, engine: Any, reference: Reference):
    tokens = np.array([2, 5, 3, 9, 4, 4, 11], np.int32)
    expected = torch.log_softmax(torch.from_numpy(reference.logits(tokens)), -1)[:-1].gather(1, torch.from_numpy(tokens[1:, None]).long())
    scores = await client.score(tokens)
    assert np.isnan(scores[0])
    np.testing.assert_allclose(scores[1:], expected[:, 0].numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("restriction", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8}])
async def test_a_restricted_support_is_recorded(restriction: dict[str, Any], engine: Any, reference: Reference):
    """Logprobs are over what each token could be drawn from, and that is what the settings leave of the distribution."""
    request = ask([2, 5, 3], temperature=0.8, max_tokens=24, **restriction)
    generation = await engine.generate(request)
    tokens = np.concatenate([request.tokens, generation.tokens])
    logits = reference.logits(tokens)[2:-1] / 0.8
    assert len(generation.support) == len(generation.tokens)
    for i, token in enumerate(generation.tokens[: reference.settled(tokens) - 2].tolist()):
        support = generation.support[i]
        probs = np.exp(logits[i] - logits[i].max()) / np.exp(logits[i] - logits[i].max()).sum()
        assert token in support and support == sorted(support)
        assert abs(generation.logprobs[i] - np.log(probs[token] / probs[support].sum())) < 1e-5
        assert left_of(probs, -1e-6, **restriction) <= set(support) <= left_of(probs, 1e-6, **restriction)


def left_of(probs: np.ndarray, slack: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """Ids that the settings leave, with or without those that are within ``slack`` of a limit, which float32 may not tell apart."""
    order = np.argsort(-probs)
    ordered = probs[order]
    nucleus = np.cumsum(ordered) - ordered <= top_p + slack  # over the whole distribution
    first = ordered >= ordered[(top_k or len(probs)) - 1] - slack
    return set(order[nucleus & first & (ordered >= min_p * probs.max() - slack)].tolist())


async def test_a_generation_up_to_the_last_position(engine: Any, reference: Reference):
    tokens = np.tile([2, 3, 4, 5], 100)[: engine.max_length - 1]
    generation = await engine.generate(ask(tokens, max_tokens=50, temperature=0.8))
    assert len(generation.tokens) == 1 and generation.finish in ("length", "stop")
    with pytest.raises(DataError, match="leaves no room"):
        await engine.generate(ask(np.tile([2, 3, 4, 5], 100)[: engine.max_length]))


async def test_a_directory_with_other_weights_is_refused(engine: Any, path: Path, tmp_path_factory: pytest.TempPathFactory):
    before = await engine.checksum()
    with pytest.raises(DataError, match="in the model the servers were started from"):
        await engine.load_weights(model_path("dense", tmp_path_factory), 3)
    assert await engine.checksum() == before and len((await engine.generate(ask([2]))).tokens)


@pytest.mark.slow
async def test_two_servers_and_the_death_of_each(path: Path, tmp_path: Path, sglang_interpreter: Path, reference: Reference):
    """Requests are spread, an update reaches both; a death is told with the log, the rest goes on, and when none is left the run ends."""
    engine = built(path, tmp_path, servers=2, interpreter=str(sglang_interpreter))
    try:
        await engine.start()
        other = reference.perturbed()
        await engine.broadcast_weights(other.weights(), 1)
        await engine.checksum()  # equal on both
        requests = [ask([2, 3, i % 9 + 2], session=f"s{i}", max_tokens=40, temperature=0.8) for i in range(16)]
        for request, generation in zip(requests, await asyncio.gather(*(engine.generate(r) for r in requests)), strict=True):
            generation_matches(request, generation, other)
        first, second = engine._processes
        killed, requests = asyncio.Event(), [ask([2, 3], session=f"t{i}", max_tokens=240) for i in range(24)]
        running = [asyncio.create_task(again(partial(engine.generate, request), killed)) for request in requests]

        async def full() -> bool:
            return await busy(first) >= 8

        await until(full, "generations to run")
        killed.set()
        os.kill(first.pid, signal.SIGKILL)
        results = await asyncio.gather(*running, return_exceptions=True)
        failures = [r for r in results if isinstance(r, BaseException)]
        assert failures and len(failures) < len(running) and all(isinstance(f, InfrastructureFailure) for f in failures)
        assert "SGLang server 0" in str(failures[0]) and "sglang-policy-0.log" in str(failures[0])
        await engine.broadcast_weights(reference.weights(), 2)
        request = ask([2, 3, 4])
        generation_matches(request, await engine.generate(request), reference)
        os.kill(second.pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"no server is left of 2:\n- SGLang server 0 (.|\n)*\n- SGLang server 1 "):
            await engine.generate(request)
    finally:
        await engine.close()


def stopping(weights: list[tuple[str, torch.Tensor]], server: Any, number: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, and in their middle a signal for the process of a server that takes them."""
    (scheduler,) = (p for p in psutil.Process(server.pid).children(recursive=True) if p.cmdline()[0] == "sglang::scheduler")
    for i, pair in enumerate(weights):
        if i == len(weights) // 2:
            scheduler.send_signal(number)
        yield pair


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
async def test_a_server_that_goes_in_the_middle_of_a_broadcast(
    number: int, path: Path, tmp_path: Path, sglang_interpreter: Path, reference: Reference, monkeypatch: Any
):
    """The other gets all of the weights and serves them; nothing is left of the first."""
    engine = built(path, tmp_path, servers=2, interpreter=str(sglang_interpreter), control_timeout_s=10)
    monkeypatch.setattr(updates, "buckets", lambda weights, _: payload.buckets(weights, 1 << 14))
    try:
        await engine.start()
        first, _ = engine._processes
        other = reference.perturbed()
        await engine.broadcast_weights(stopping(other.weights(), first, number), 1)
        assert not first.alive() and engine._fleet.living == [engine._servers[1]]
        request = ask([2, 3, 4])
        generation_matches(request, await engine.generate(request), other)
        await engine.broadcast_weights(reference.weights(), 2)
        generation_matches(request, await engine.generate(request), reference)
    finally:
        await engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "field, complaint",
    [
        ({"mlp_only_layers": [1]}, r"has experts in layers \[0, 1\], where .* declares them in \[0\]"),
        ({"tie_word_embeddings": True}, "ties the output projection to the embedding, but .* has one of its own"),
    ],
    ids=["dense-layer", "tied"],
)
async def test_a_model_that_sglang_does_not_run_as_it_was_made(
    path: Path, tmp_path: Path, sglang_interpreter: Path, field: dict[str, Any], complaint: str
):
    """SGLang 0.5.23 gives every layer of Qwen3-MoE experts, and the model an output projection, whatever the config says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, **field)
    shutil.copytree(path, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    engine = built(tmp_path / "model", tmp_path, interpreter=str(sglang_interpreter))
    with pytest.raises(ConfigError, match=complaint):
        await engine.start()
    await engine.close()
