"""Weights to engines that are servers: the transports `tensor` and `disk`, and the SGLang engine over fake servers that misbehave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import pickle
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.fake_sglang import DROP, SILENCE, FakeServer, serving
from safetensors.torch import save_file
from torch import Tensor

from miles_core.digests import checksum
from miles_core.errors import ConfigError, DataError, InfrastructureFailure, RunError
from miles_core.plugins import config_class
from miles_core.protocols import GenerateRequest, SamplingParams
from miles_rollout.local.weights import read_weights
from miles_rollout.sglang.client import Deadlines
from miles_rollout.sglang.payload import buckets

# ---- the transports, between a trainer and engines of two tensors -------------------------------------------------------


class Source:
    """A trainer of two tensors."""

    def __init__(self) -> None:
        self.weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}
        self.exported: list[Path] = []

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()

    async def export(self, directory: Path) -> None:
        self.exported.append(directory)
        save_file(self.weights, directory / "model.safetensors")


class Sink:
    """An engine that holds them; ``spoil`` are what it makes of weights that come by value, and from a disk."""

    def __init__(self, by_value: float = 1.0, from_disk: float = 1.0) -> None:
        self.weights: dict[str, Tensor] = {}
        self.version, self.by_value, self.from_disk, self.loads = 0, by_value, from_disk, 0
        self.state = "serving"
        self.done: list[str] = []

    @contextlib.asynccontextmanager
    async def syncing(self) -> AsyncIterator[None]:
        self.state = "syncing"
        try:
            yield
        except RunError:
            self.state = "failed"
            raise
        self.state = "serving"

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.done.append(self.state)
        self.weights, self.version = {name: tensor * self.by_value for name, tensor in weights}, version

    async def broadcast_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        await self.update_weights(weights, version)

    async def load_weights(self, directory: Path, version: int) -> None:
        self.loads += 1
        self.done.append(self.state)
        self.weights, self.version = {name: tensor * self.from_disk for name, tensor in read_weights(directory)}, version

    async def checksum(self) -> str:
        self.done.append(self.state)
        return checksum(sorted(self.weights.items()))


class OtherSink(Sink):
    """An engine of another kind: its checksums mean something else."""

    async def checksum(self) -> str:
        return "other" + await super().checksum()


def transport(use: str, tiny: Any, tmp_path: Path, **options: Any) -> Any:
    return config_class("weight_transport", use).model_validate({"use": use, **options}).build(tiny.context(run_dir=tmp_path))


@pytest.mark.parametrize("use", ["tensor", "collective", "disk"])
async def test_every_sink_gets_the_weights(use: str, tiny: Any, tmp_path: Path):
    source, sinks = Source(), [Sink(), Sink(), OtherSink()]
    metrics = await transport(use, tiny, tmp_path).publish(source, sinks, 4)
    for sink in sinks:
        assert sink.version == 4 and all(torch.equal(sink.weights[n], t) for n, t in source.weights.items())
    assert metrics["bytes"] >= 3 * (6 * 4 + 4 * 2) and metrics["seconds"] > 0
    assert source.exported and not source.exported[0].exists()  # nothing is left behind
    assert all(sink.state == "serving" and set(sink.done) == {"syncing"} for sink in sinks)  # not before everything was compared


@pytest.mark.parametrize("use, spoil", [("tensor", {"by_value": 2.0}), ("collective", {"by_value": 2.0}), ("disk", {"from_disk": 2.0})])
async def test_engines_of_one_kind_that_differ_are_named(use: str, spoil: Any, tiny: Any, tmp_path: Path):
    message = r"engine 2 \(Sink\) does not hold the same weights as engine 0 after version 4.*must not be used"
    with pytest.raises(RunError, match=message):
        await transport(use, tiny, tmp_path).publish(Source(), sinks := [Sink(), OtherSink(), Sink(**spoil)], 4)
    assert {sink.state for sink in sinks} == {"failed"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", [{"by_value": 2.0}, {"from_disk": 2.0}])
async def test_by_value_and_from_disk_must_agree(spoil: Any, tiny: Any, tmp_path: Path):
    with pytest.raises(RunError, match=r"engine 0 \(Sink\) held other weights after version 4 .* than after it loaded an export"):
        await transport("tensor", tiny, tmp_path).publish(Source(), sinks := [Sink(**spoil), Sink(**spoil)], 4)
    assert {sink.state for sink in sinks} == {"failed"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("every, loads", [(0, [0, 0, 0, 0, 0]), (1, [1, 2, 3, 4, 5]), (2, [1, 2, 3, 3, 4]), (3, [1, 2, 2, 3, 3])])
async def test_verified_at_the_first_two_and_every_so_many(every: int, loads: list[int], tiny: Any, tmp_path: Path):
    sink, publisher = Sink(), transport("tensor", tiny, tmp_path, verify_every=every)
    seen = [0]
    for version in range(5):
        metrics = await publisher.publish(Source(), [sink], version)
        seen.append(sink.loads)
        assert metrics["verified"] == seen[-1] - seen[-2]
    assert seen[1:] == loads


# ---- what goes over the wire ------------------------------------------------------------------------------------------


def unpacked(body: dict[str, Any]) -> dict[str, Tensor]:
    """As SGLang reads a request."""
    assert body["load_format"] == "flattened_bucket" and body["flush_cache"] is True
    (encoded,) = set(body["serialized_named_tensors"])
    held = pickle.loads(base64.b64decode(encoded, validate=True))
    flat = held["flattened_tensor"]
    return {m.name: flat[m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape) for m in held["metadata"]}


@pytest.mark.parametrize("piece", [3, 192 << 10])
async def test_buckets_hold_every_weight_whole(piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("miles_rollout.sglang.payload.PIECE_BYTES", piece)
    generator = torch.Generator().manual_seed(1)
    weights = {
        "a": torch.randn(10, 3, generator=generator),
        "scalar": torch.tensor(2.5),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "wide": torch.randn(50, 4, generator=generator),
        "strided": torch.randn(4, 6, generator=generator).t(),
        "odd": torch.arange(3, dtype=torch.uint8),
        "c": torch.nn.Parameter(torch.randn(5, generator=generator)),
    }
    packed = list(buckets(weights.items(), 256))
    found: dict[str, Tensor] = {}
    for bucket in packed:
        request = bucket.request()
        body = b"".join([piece async for piece in request.pieces(2)])
        assert len(body) == request.length(2)
        found |= unpacked(json.loads(body))
    assert list(found) == list(weights)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in weights.items())
    assert [len(bucket.entries) for bucket in packed] == [3, 1, 2, 1]  # one weight is larger than a bucket, one would begin at an odd byte


# ---- the engine over fake servers -------------------------------------------------------------------------------------


def request(session: str = "s", tokens: Any = (1, 2, 4), n: int = 4, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(session, np.array(tokens, np.int32), SamplingParams(n, **sampling), key=1)


def weights_of(tiny: Any) -> dict[str, Tensor]:
    return dict(read_weights(tiny.path))


async def test_an_update_by_value(tiny: Any):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        assert engine.version == 0 and fakes[0].version == "0"
        await engine.update_weights(weights_of(tiny).items(), 5)
        assert engine.version == 5
        for fake in fakes:
            arrived = {}
            for path, body in fake.seen:
                if path == "/update_weights_from_tensor":
                    arrived |= unpacked(body)
            assert fake.version == "5" and not fake.paused and not fake.open_update
            assert checksum(sorted(arrived.items())) == checksum(sorted(weights_of(tiny).items()))
            calls = [path for path in fake.paths() if path != "/model_info"]
            order = ["/pause_generation", "/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]
            assert calls[calls.index(order[0]) :] == [*order, "/update_weight_version", "/continue_generation"]


class ModelSource(Source):
    """A trainer of the tiny model."""

    def __init__(self, tiny: Any) -> None:
        self.weights, self.path = weights_of(tiny), tiny.path

    async def export(self, directory: Path) -> None:
        for file in self.path.glob("*"):
            (directory / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("use", ["tensor", "collective"])
@pytest.mark.parametrize("fault", [False, True], ids=["sound", "one-bit"])
async def test_a_server_is_stamped_and_asked_only_when_what_it_holds_was_verified(use: str, fault: bool, tiny: Any, tmp_path: Path):
    fake = FakeServer()

    def load(body: Any, usual: Any) -> Any:
        fake.checksum = "c1" if fault else fake.checksum
        return usual

    async with serving(tiny, fake) as engine:
        fake.overrides["/update_weights_from_disk"] = load
        fake.seen.clear()
        publishing = asyncio.create_task(transport(use, tiny, tmp_path).publish(ModelSource(tiny), [engine], 4))
        while not fake.paused:
            await asyncio.sleep(0)
        asked = asyncio.create_task(engine.generate(request()))
        if fault:
            with pytest.raises(RunError, match="held other weights after version 4"):
                await publishing
            with pytest.raises(RunError, match=r"serves nothing: version 4 .* did not arrive whole and verified .* held other weights"):
                await asked
            assert engine.version == 0 and fake.version == "0" and "/generate" not in fake.paths()
            assert not fake.paused  # a later update finds it as it was
        else:
            await publishing
            assert set((await asked).versions.tolist()) == {4} and engine.version == 4
            last = len(fake.seen) - fake.paths()[::-1].index("/weights_checker")
            assert fake.paths()[last:] == ["/update_weight_version", "/model_info", "/continue_generation", "/generate"]
        by_value = {path for path in fake.paths() if path.startswith("/update_weights_from")} - {"/update_weights_from_disk"}
        assert by_value == {"/update_weights_from_tensor" if use == "tensor" else "/update_weights_from_distributed"}


async def test_running_requests_are_taken_back_and_go_on(tiny: Any):
    """What was sampled before an update keeps version and logprob; its routing rows are not asked for again."""
    fake = FakeServer()
    async with serving(tiny, fake) as engine:
        fake.abortable = True
        generation = asyncio.create_task(engine.generate(request(n=6)))
        await fake.arrived.wait()

        def once_paused(body: Any, usual: Any) -> Any:
            fake.abortable = False
            return usual

        fake.overrides["/pause_generation"] = once_paused
        await engine.update_weights(weights_of(tiny).items(), 1)
        result = await generation
    assert result.tokens.tolist() == [3] * 6 and result.versions.tolist() == [0, 0, 1, 1, 1, 1] and result.finish == "length"
    assert result.logprobs.tolist() == [-1, -2, -1, -2, -3, -4]
    asked = [body for path, body in fake.seen if path == "/generate"]
    assert [body["input_ids"] for body in asked] == [[1, 2, 4], [1, 2, 4, 3, 3]]
    assert asked[1]["sampling_params"]["max_new_tokens"] == 4


async def test_a_generation_asked_for_while_weights_change_waits_for_the_last_of_them(tiny: Any):
    """Two updates one after the other: when it hears that the first is done, the second has begun."""
    fake = FakeServer()
    generations: list[asyncio.Task[Any]] = []

    def ask(body: Any, usual: Any) -> Any:
        if not generations:
            generations.append(asyncio.create_task(engine.generate(request())))
        return usual

    async with serving(tiny, fake) as engine:
        fake.overrides["/update_weight_version"] = ask
        for version in (1, 2):
            await engine.update_weights(weights_of(tiny).items(), version)
        result = await generations[0]
    assert result.versions.tolist() == [2] * 4 and len(result.tokens) == 4
    calls = [path for path in fake.paths() if path in ("/generate", "/continue_generation")]
    assert calls == ["/continue_generation", "/continue_generation", "/generate"]


@pytest.mark.parametrize("end", ["end of text", "stop token"])
async def test_a_request_that_is_taken_back_at_its_end_ends_there(end: str, tiny: Any):
    """Its server says "abort", though the last token it sampled is one that ends a generation."""
    fake = FakeServer()
    last = tiny.tokenizer.eos_token_id if end == "end of text" else 5
    asked = request(n=6) if end == "end of text" else request(n=6, stop_token_ids=(last,))

    def ended(body: Any, usual: Any) -> Any:
        fake.abortable = False
        return {"output_ids": [3, last], "meta_info": usual["meta_info"] | {"output_token_logprobs": [[-1.0, 3, None], [-2.0, last, None]]}}

    async with serving(tiny, fake) as engine:
        fake.abortable = True
        fake.overrides["/generate"] = ended
        generation = asyncio.create_task(engine.generate(asked))
        await fake.arrived.wait()
        await engine.update_weights(weights_of(tiny).items(), 1)
        result = await generation
    assert result.tokens.tolist() == [3, last] and result.finish == "stop" and result.versions.tolist() == [0, 0]
    assert fake.paths().count("/generate") == 1


async def test_a_stop_text_ends_a_generation_however_it_is_written(tiny: Any):
    """SGLang looks for it in as many tokens as its tokenizer would take; "ab" may be one token or two."""
    fake = FakeServer()
    a, b = tiny.tokenizer.encode("a")[0], tiny.tokenizer.convert_tokens_to_ids("b")
    fake.overrides["/generate"] = lambda body, usual: {
        "output_ids": [a, a, b, a],
        "meta_info": usual["meta_info"] | {"output_token_logprobs": [[-1.0, t, None] for t in (a, a, b, a)]},
    }
    async with serving(tiny, fake) as engine:
        result = await engine.generate(request(n=4, stop=("ab",)))
        assert result.tokens.tolist() == [a, a, b] and result.finish == "stop" and len(result.logprobs) == len(result.versions) == 3


async def test_requests_are_checked_before_they_are_sent(tiny: Any):
    fake = FakeServer()
    async with serving(tiny, fake) as engine:
        fake.seen.clear()
        for bad, message in [
            (request(tokens=[len(tiny.tokenizer)]), "outside the vocabulary"),
            (request(tokens=[]), "is empty"),
            (request(tokens=[1] * 100), "leaves no room: the engine takes 100 in all"),
            (request(temperature=-1.0), "out of range"),
        ]:
            with pytest.raises(DataError, match=message):
                await engine.generate(bad)
        assert fake.seen == []


def spoilt(tiny: Any, name: str, change: str) -> list[tuple[str, Tensor]]:
    weights = weights_of(tiny)
    tensor = weights[name]
    match change:
        case "unknown":
            weights[f"{name}.extra"] = tensor
        case "missing":
            del weights[name]
        case "shape":
            weights[name] = tensor[..., :-1]
        case "dtype":
            weights[name] = tensor.bfloat16()
        case "twice":
            return [*weights.items(), (name, tensor)]
    return list(weights.items())


@pytest.mark.parametrize(
    "change, message",
    [
        ("unknown", r"'model.norm.weight.extra' is unknown to the model"),
        ("missing", r"1 weights are missing, the first is 'model.norm.weight'"),
        ("shape", r"'model.norm.weight' is float32 \[63\], the servers hold float32 \[64\]"),
        ("dtype", r"'model.norm.weight' is bfloat16 \[64\], the servers hold float32"),
        ("twice", r"'model.norm.weight' comes twice"),
    ],
)
async def test_a_weight_that_does_not_fit_is_named_and_nothing_changed(change: str, message: str, tiny: Any):
    fake = FakeServer()
    async with serving(tiny, fake) as engine:
        with pytest.raises(DataError, match=message):
            await engine.update_weights(spoilt(tiny, "model.norm.weight", change), 3)
        assert "/update_weights_from_tensor" not in fake.paths() and "/begin_weight_update" not in fake.paths()
        assert engine.version == 0 and not fake.paused
        assert (await engine.generate(request())).versions.tolist() == [0] * 4


async def test_a_failure_in_the_middle_leaves_nothing_serving_until_an_update_succeeds(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("miles_rollout.sglang.updates.buckets", lambda weights, _: buckets(weights, 1 << 14))
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        with pytest.raises(DataError, match="weights are missing"):
            await engine.update_weights(spoilt(tiny, "model.norm.weight", "missing"), 3)
        assert "/update_weights_from_tensor" in fakes[0].paths() and not any(f.open_update or f.paused for f in fakes)
        with pytest.raises(RunError, match=r"serves nothing: version 3 .* did not arrive whole and verified \(1 weights are missing"):
            await engine.generate(request())
        await engine.update_weights(weights_of(tiny).items(), 4)
        assert (await engine.generate(request())).versions.tolist() == [4] * 4


@pytest.mark.parametrize(
    "path, answer, message",
    [
        (
            "/update_weights_from_tensor",
            {"success": False, "message": "no room"},
            r"server 1 .*did not do /update_weights_from_tensor: no room",
        ),
        ("/begin_weight_update", (400, {"success": False, "message": "is open"}), r"server 1 .*refuses /begin_weight_update.*is open"),
        ("/update_weight_version", {"success": True}, r"server 1 .* serves version 0 of the weights after version 3 was published"),
        ("/update_weights_from_tensor", b'{"success": tr', r"server 1 .*/update_weights_from_tensor with 14 bytes that are no JSON"),
    ],
)
async def test_a_server_that_does_not_take_an_update(path: str, answer: Any, message: str, tiny: Any):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        fakes[1].overrides[path] = answer
        with pytest.raises(RunError, match=message):
            await engine.update_weights(weights_of(tiny).items(), 3)
        with pytest.raises(RunError, match="serves nothing"):
            await engine.generate(request())
        fakes[1].overrides.clear()
        await engine.update_weights(weights_of(tiny).items(), 4)
        assert engine.version == 4 and len((await engine.generate(request())).tokens) == 4


async def test_weights_from_a_directory(tiny: Any, tmp_path: Path):
    fake = FakeServer()
    async with serving(tiny, fake) as engine:
        await engine.load_weights(tiny.path, 6)
        assert engine.version == 6 and ("/update_weights_from_disk" in fake.paths())
        save_file({**weights_of(tiny), "model.norm.weight": torch.zeros(63)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
        with pytest.raises(DataError, match=r"'model.norm.weight' in .* is \[63\], in the model the servers were started from \[64\]"):
            await engine.load_weights(tmp_path, 7)
        assert engine.version == 6 and len((await engine.generate(request())).tokens) == 4


async def test_checksums_that_differ_are_named(tiny: Any):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        assert await engine.checksum() == await engine.checksum()
        fakes[1].checksum = "c1"
        with pytest.raises(RunError, match=r"SGLang server 1 \(.*\) does not hold the same weights as SGLang server 0"):
            await engine.checksum()


async def test_requests_go_to_the_server_with_the_fewest_and_not_to_the_dead(tiny: Any):
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        for fake in fakes:
            fake.abortable = True
        calls = [asyncio.create_task(engine.generate(request(f"s{i}"))) for i in range(4)]
        while sum(len(f.waiting) for f in fakes) < 4:
            await asyncio.sleep(0.01)
        assert [len(f.waiting) for f in fakes] == [2, 2]
        fakes[0].overrides = dict.fromkeys(["/v1/loads", "/abort_request"], DROP)
        await fakes[0].die()
        for call in calls[0], calls[2]:
            with pytest.raises(InfrastructureFailure, match=r"SGLang server 0 .* broke off /generate"):
                await call
        for event in fakes[1].waiting.values():
            event.set()
        assert [(await call).finish for call in (calls[1], calls[3])] == ["abort", "abort"]
        fakes[1].abortable = False
        fakes[0].seen.clear()
        for i in range(3):
            await engine.generate(request(f"t{i}"))
        await engine.update_weights(weights_of(tiny).items(), 1)  # by those that are left
        assert fakes[0].seen == [] and engine.version == 1 and fakes[1].version == "1"
        fakes[1].overrides = dict.fromkeys(["/generate", "/v1/loads", "/abort_request"], DROP)
        with pytest.raises(RunError, match=r"no server is left of 2:\n- SGLang server 0 .*\n- SGLang server 1 .*Its log is where"):
            await engine.generate(request())


async def test_a_fault_of_a_living_server_costs_the_request_alone(tiny: Any):
    fake = FakeServer()
    async with serving(tiny, fake) as engine:
        fake.overrides["/generate"] = b'{"output_ids": ['
        with pytest.raises(InfrastructureFailure, match="no JSON"):
            await engine.generate(request())
        fake.overrides.clear()
        assert len((await engine.generate(request())).tokens) == 4


async def test_a_server_that_is_silent_in_a_generation_is_lost(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    """Though it says that it is there: its scheduler hangs."""
    fakes = FakeServer(), FakeServer()
    async with serving(tiny, *fakes) as engine:
        fakes[0].overrides["/generate"] = SILENCE
        monkeypatch.setattr(engine._servers[0].client, "_deadlines", Deadlines(generate_s=0.5, control_s=60))  # the other has its time
        with pytest.raises(InfrastructureFailure, match=r"SGLang server 0 .* did not answer /generate within 0.5 s"):
            await engine.generate(request())
        fakes[0].seen.clear()
        for _ in range(2):
            assert len((await engine.generate(request())).tokens) == 4
        await engine.update_weights(weights_of(tiny).items(), 1)
        assert fakes[0].seen == [] and fakes[1].version == "1"


async def test_requests_that_do_not_come_back_stop_the_update(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    fake = FakeServer()
    async with serving(tiny, fake) as engine:
        monkeypatch.setattr(engine, "_config", engine._config.model_copy(update={"control_timeout_s": 0.5}))  # servers have their time
        fake.overrides["/generate"] = SILENCE
        call = asyncio.create_task(engine.generate(request()))
        while "/generate" not in fake.paths():
            await asyncio.sleep(0.01)
        with pytest.raises(RunError, match=r"waited 0.5 s for 1 aborted requests to come back"):
            await engine.update_weights(weights_of(tiny).items(), 1)
        await engine.close()
        with pytest.raises(InfrastructureFailure, match="closed while it generated"):
            await call
        with pytest.raises(RunError, match="serves nothing: it was closed"):
            await engine.generate(request())


@pytest.mark.parametrize(
    "path, answer, message",
    [
        ("/server_info", lambda b, u: u | {"version": "0.4.1"}, r"is SGLang 0.4.1; Miles speaks to 0.5.23"),
        ("/server_info", lambda b, u: u | {"dtype": "bfloat16"}, r"serves bfloat16 weights, the engine's dtype is float32"),
        ("/server_info", (401, {"error": "Unauthorized"}), r"does not take the API key"),
        ("/server_info", (404, {}), r"it is no SGLang server"),
        (
            "/weights_checker",
            lambda b, u: u | {"ranks": [{"checksums": {"model.layers.1.mlp.experts.w2_weight": "x"}}]},
            r"has experts in layers \[1\], where .*config.json declares them in \[\]",
        ),
        ("/model_info", lambda b, u: u | {"architectures": ["LlamaForCausalLM"]}, r"another model: it is LlamaForCausalLM, .* is Qwen3For"),
        ("/server_info", lambda b, u: u | {"max_req_input_len": 200}, r"another model: it takes 200 tokens, .* has 128 positions"),
        (
            "/weights_checker",
            lambda b, u: u | {"ranks": [{"checksums": {f"model.layers.{i}.input_layernorm.weight": "x" for i in range(3)}}]},
            r"another model: it has 3 layers, .* has 2",
        ),
    ],
)
async def test_a_server_that_does_not_fit_is_refused_at_the_start(path: str, answer: Any, message: str, tiny: Any):
    fake = FakeServer()
    fake.overrides[path] = answer
    with pytest.raises(ConfigError, match=message):
        async with serving(tiny, fake):
            pass


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_theta": 5e5}, r"rope_parameters is \{.*500000.*\}, .* says \{.*10000.*\}"),
        ({"hidden_size": 32}, r"hidden_size is 32, .* says 64"),
        ({"initializer_range": 0.3}, None),
        ({"model_type": "none"}, r"SGLang server 0 .* cannot be compared with .* cannot be read: .* says model_type 'none'"),
    ],
)
async def test_the_directory_a_server_was_started_from_is_read_where_it_can_be(
    change: dict[str, Any], message: str | None, tiny: Any, tmp_path: Path
):
    fake, config = FakeServer(), json.loads((tiny.path / "config.json").read_text())
    if theta := change.get("rope_theta"):
        config["rope_parameters"]["rope_theta"] = theta
    else:
        config |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny.path / "model.safetensors").read_bytes())
    fake.overrides["/server_info"] = lambda body, usual: usual | {"model_path": str(tmp_path)}
    with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
        async with serving(tiny, fake):
            pass


async def test_servers_that_are_cut_otherwise_are_no_one_engine(tiny: Any):
    fakes = FakeServer(), FakeServer()
    fakes[1].overrides["/server_info"] = lambda body, usual: usual | {"tp_size": 2}
    with pytest.raises(
        ConfigError, match=r"server 1 .* is cut otherwise \(tp_size 2, pp_size 1, ep_size 1\) than .*server 0 .*\(tp_size 1"
    ):
        async with serving(tiny, *fakes):
            pass


async def test_options_that_do_not_fit(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"max_length is 200, but its servers take sequences of 100 tokens"):
        async with serving(tiny, FakeServer(), max_length=200):
            pass
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, which is not set"):
        async with serving(tiny, FakeServer(), key_variable="NO_SUCH_KEY"):
            pass


async def test_closing_without_a_start_is_fine(tiny: Any):
    engine = config_class("rollout_engine", "sglang").model_validate({"use": "sglang"}).build(tiny.context())
    with pytest.raises(RunError, match="was not started"):
        await engine.generate(request())
    await engine.close()
    await engine.close()
