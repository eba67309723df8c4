"""The engines' conformance suite: `local` and `sglang` against plain transformers, dense and mixture of experts.

What a rollout relies on, whichever engine samples: log-probabilities are those of the distribution each token came from, routing is
the model's own, versions say which weights sampled, stops end where they should, weights arrive whole, and bad requests are sentences
that leave the engine as it was. SGLang runs one server a session on the mixture of experts; the dense one is among the slow tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.engines import Reference, attached, generation_matches, model_path

from miles_core.errors import DataError, RunError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, GenerateRequest, Generation, SamplingParams
from miles_core.tokenizers import load_tokenizer

CASES = [
    pytest.param("local", "dense", id="local-dense"),
    pytest.param("local", "moe", id="local-moe"),
    pytest.param("sglang", "moe", id="sglang-moe"),
    pytest.param("sglang", "dense", id="sglang-dense", marks=pytest.mark.slow),
]
pytestmark = pytest.mark.parametrize("kind, model", CASES, indirect=True)


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def path(model: str, request: pytest.FixtureRequest) -> Path:
    return model_path(model, request.getfixturevalue("tmp_path_factory"))


@pytest.fixture
async def engine(kind: str, model: str, path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """Ready to serve version 0 of the model in ``path``."""
    options = attached(request.getfixturevalue(f"sglang_{model}_server")) if kind == "sglang" else {}
    config = config_class("rollout_engine", kind).model_validate({"use": kind, "dtype": "float32", **options})
    built = config.build(BuildContext(tmp_path, "test", 0, model="policy", model_path=path, tokenizer=load_tokenizer(path)))
    try:
        await built.start()
        await built.load_weights(path, 0)
        yield built
    finally:
        await built.close()


@pytest.fixture
def reference(path: Path) -> Reference:
    return Reference(path)


def ask(tokens: list[int] | np.ndarray, *, session: str = "s", routing_start: int = 0, **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**({"max_tokens": 16, "temperature": 0.8} | sampling))
    return GenerateRequest(session, np.asarray(tokens, np.int32), params, key=17, routing_start=routing_start)


def prompts(n: int, vocab: int = 20) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(1, vocab, size=int(length)).astype(np.int32) for length in rng.integers(1, 24, size=n)]


async def test_many_at_a_time(engine: Any, reference: Reference):
    requests = [ask(p, session=f"s{i}", temperature=(0.7, 1.0, 1.5)[i % 3], max_tokens=1 + i % 12) for i, p in enumerate(prompts(12))]
    generations = await asyncio.gather(*(engine.generate(r) for r in requests))
    for request, generation in zip(requests, generations, strict=True):
        generation_matches(request, generation, reference)
        assert set(generation.versions.tolist()) == {0}


async def test_greedy_takes_the_likeliest(engine: Any, reference: Reference):
    request = ask(prompts(1)[0], temperature=0.0)
    generation = await engine.generate(request)
    logits = reference.logits(np.concatenate([request.tokens, generation.tokens]))
    start = len(request.tokens) - 1
    np.testing.assert_array_equal(generation.tokens, logits[start : start + len(generation.tokens)].argmax(-1))


async def test_turns_go_on_with_the_routing_that_is_missing(engine: Any, reference: Reference, model: str):
    """A second turn after injected tokens: rows already recorded are not sent again, those of both turns make the whole."""
    first = ask(prompts(3)[2], max_tokens=5)
    one = await engine.generate(first)
    context = np.concatenate([first.tokens, one.tokens, np.array([3, 4], np.int32)])
    recorded = len(first.tokens) + len(one.tokens) - 1
    second = ask(context, max_tokens=6, routing_start=recorded if model == "moe" else 0)
    two = await engine.generate(second)
    generation_matches(second, two, reference)
    await engine.release("s")
    if model == "dense":
        assert one.routing is None and two.routing is None
        return
    assert one.routing is not None and two.routing is not None and len(one.routing) == recorded
    whole = np.concatenate([context, two.tokens])
    joined = np.concatenate([one.routing, two.routing])
    assert len(joined) == len(whole) - 1
    reference.chose(joined, whole)


async def test_a_stop_id_ends_and_stays(engine: Any, reference: Reference):
    """Each token that a long generation holds, given as stop id to a greedy one, ends it right there."""
    request = ask(prompts(2)[1], temperature=0.0, max_tokens=12)
    whole = await engine.generate(request)
    stop = int(whole.tokens[min(4, len(whole.tokens) - 1)])
    first = int(np.flatnonzero(whole.tokens == stop)[0])
    ended = await engine.generate(ask(request.tokens, temperature=0.0, max_tokens=12, stop_token_ids=(stop,)))
    assert ended.finish == "stop"
    np.testing.assert_array_equal(ended.tokens, whole.tokens[: first + 1])
    generation_matches(request, ended, reference)


async def test_a_stop_text_ends_with_the_token_that_completes_it(engine: Any, path: Path, reference: Reference):
    tokenizer = load_tokenizer(path)
    request = ask(prompts(2)[1], temperature=0.0, max_tokens=12)
    whole = await engine.generate(request)
    assert len(whole.tokens) >= 4
    text = tokenizer.decode(whole.tokens[2:4].tolist())
    through = next(n for n in range(1, len(whole.tokens) + 1) if text in tokenizer.decode(whole.tokens[:n].tolist()))
    ended = await engine.generate(ask(request.tokens, temperature=0.0, max_tokens=12, stop=(text,)))
    assert ended.finish == "stop"
    np.testing.assert_array_equal(ended.tokens, whole.tokens[:through])
    assert len(ended.logprobs) == len(ended.versions) == through


async def test_the_end_of_text_always_ends(engine: Any, path: Path, reference: Reference):
    """Very hot sampling draws every id sooner or later; the end-of-text id is the last of whatever it ends."""
    end = load_tokenizer(path).eos_token_id
    found = await asyncio.gather(
        *(engine.generate(ask(p, session=f"e{i}", temperature=50.0, max_tokens=60)) for i, p in enumerate(prompts(12)))
    )
    stopped = [g for g in found if g.finish == "stop"]
    assert stopped and all(g.tokens[-1] == end and end not in g.tokens[:-1] for g in stopped)
    assert all(end not in g.tokens for g in found if g.finish == "length")


async def test_length_is_the_finish_at_the_limit(engine: Any):
    generation = await engine.generate(ask([1, 2, 3], max_tokens=3, temperature=0.0, stop_token_ids=()))
    assert generation.finish in ("length", "stop") and (generation.finish == "stop" or len(generation.tokens) == 3)


async def test_new_weights_sample_from_the_next_token_on(engine: Any, reference: Reference):
    """Weights that arrive in the middle: tokens before keep version and log-probability, those after are the new weights'."""
    requests = [ask(p, session=f"w{i}", temperature=1.0, max_tokens=100) for i, p in enumerate(prompts(6))]
    running = [asyncio.ensure_future(engine.generate(r)) for r in requests]
    await asyncio.sleep(0.3)
    new = Reference(reference.path).perturbed()
    await engine.update_weights(new.weights(), 5)
    assert engine.version == 5
    generations = await asyncio.gather(*running)
    for request, generation in zip(requests, generations, strict=True):
        assert set(generation.versions.tolist()) <= {0, 5} and (np.diff(generation.versions) >= 0).all()
        for version, judge in ((0, reference), (5, new)):
            rows = generation.versions == version
            if rows.any():
                judge.agrees(request, generation, rows)
    after = await engine.generate(ask([1, 2, 3]))
    assert set(after.versions.tolist()) == {5}


async def test_weights_by_value_and_from_disk_are_the_same(engine: Any, reference: Reference, tmp_path: Path):
    await engine.load_weights(reference.path, 1)
    loaded = await engine.checksum()
    await engine.update_weights(reference.weights(), 2)
    assert await engine.checksum() == loaded and engine.version == 2
    other = reference.perturbed()
    await engine.update_weights(other.weights(), 3)
    changed = await engine.checksum()
    assert changed != loaded
    other.save(tmp_path / "other")
    await engine.update_weights(reference.weights(), 4)
    assert await engine.checksum() == loaded
    await engine.load_weights(tmp_path / "other", 5)
    assert await engine.checksum() == changed and engine.version == 5


class Wire:
    """The engine as a sink of a publish. It may turn one bit over on the way, and asks for a generation as soon as weights have arrived."""

    def __init__(self, engine: Any, turn: bool) -> None:
        self.engine, self.turn = engine, turn
        self.asked: list[asyncio.Task[Generation]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def update_weights(self, weights: Any, version: int) -> None:
        given = [(name, tensor.clone()) for name, tensor in weights]
        if self.turn:
            given[3][1].view(torch.uint8).view(-1)[0] ^= 1
        await self.engine.update_weights(given, version)
        self.asked.append(asyncio.create_task(self.engine.generate(ask([4, 5, 6], session="asked"))))
        done, _ = await asyncio.wait(self.asked[-1:], timeout=0.2)  # ten times what it would take
        assert not done, "a request was served with weights that nobody had looked at"


class Source:
    """A trainer that holds a reference's weights."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def named_weights(self) -> Any:
        yield from self.reference.weights()

    async def export(self, directory: Path) -> None:
        self.reference.save(directory)


@pytest.mark.parametrize("fault", [True, False], ids=["one-bit", "sound"])
async def test_nothing_is_sampled_before_weights_are_verified(fault: bool, engine: Any, kind: str, reference: Reference, tmp_path: Path):
    """Who asks between arrival and proof waits, and so does who was being served: for tokens of the new weights, or for a refusal."""
    use = {"local": "inline", "sglang": "tensor"}[kind]
    context = BuildContext(tmp_path, "test", 0, model="policy", model_path=reference.path)
    transport = config_class("weight_transport", use).model_validate({"use": use}).build(context)
    wire, new = Wire(engine, fault), reference.perturbed()
    requests = [ask(p, session=f"r{i}", temperature=1.0, max_tokens=200) for i, p in enumerate(prompts(6))]
    running = [asyncio.create_task(engine.generate(r)) for r in requests]
    if fault:
        with pytest.raises(RunError, match="version 5"):
            await transport.publish(Source(new), [wire], 5)
        for refused in (wire.asked[0], engine.generate(ask([7]))):
            with pytest.raises(RunError, match="serves nothing: version 5 of its weights did not arrive whole and verified"):
                await refused
        assert engine.version == 0
        wire.turn = False
    await transport.publish(Source(new), [wire], 6)
    assert engine.version == 6
    request, generation = ask([4, 5, 6], session="asked"), await wire.asked[-1]
    generation_matches(request, generation, new)
    assert set(generation.versions.tolist()) == {6}
    for end in await asyncio.gather(*running, return_exceptions=True):  # some had come to their end before
        if isinstance(end, Generation):
            assert set(end.versions.tolist()) <= ({0} if fault else {0, 6})
        else:
            assert fault and isinstance(end, RunError) and "version 5" in str(end)


@pytest.mark.parametrize("fault", ["unknown", "missing", "shape", "twice"])
async def test_weights_that_do_not_fit_are_refused(engine: Any, reference: Reference, fault: str):
    """The sentence names the weight; afterwards the engine serves what it had or refuses to serve, and a good update mends it."""
    good = reference.weights()
    name, tensor = good[3]
    bad = {
        "unknown": [*good, ("model.layers.77.nonsense.weight", tensor)],
        "missing": [w for w in good if w[0] != name],
        "shape": [(n, t[:-1].clone() if n == name else t) for n, t in good],
        "twice": [*good, good[3]],
    }[fault]
    with pytest.raises(DataError, match="nonsense" if fault == "unknown" else name.replace(".", r"\.")):
        await engine.update_weights(bad, 9)
    await engine.update_weights(good, 10)
    request = ask([4, 5, 6])
    generation_matches(request, await engine.generate(request), reference)


@pytest.mark.parametrize(
    "request_, complaint",
    [
        (ask([1, 2, 10_000]), "10000"),
        (ask([1, -1]), "-1"),
        (ask([]), "empty"),
        (ask([1] * 5000), "5000"),
    ],
    ids=["beyond", "negative", "empty", "long"],
)
async def test_a_bad_request_is_a_sentence_and_nothing_else(engine: Any, reference: Reference, request_: GenerateRequest, complaint: str):
    with pytest.raises(DataError, match=complaint):
        await engine.generate(request_)
    good = ask([4, 5, 6])
    generation_matches(good, await engine.generate(good), reference)


async def test_who_gives_up_takes_nothing_along(engine: Any, reference: Reference):
    """Cancelled generations end on the engine; others go on."""
    given_up = [asyncio.ensure_future(engine.generate(ask(p, session=f"c{i}", max_tokens=100))) for i, p in enumerate(prompts(4))]
    kept = asyncio.ensure_future(engine.generate(ask([7, 8], session="kept", max_tokens=40)))
    await asyncio.sleep(0.1)
    for task in given_up:
        task.cancel()
    assert all(isinstance(x, asyncio.CancelledError | Generation) for x in await asyncio.gather(*given_up, return_exceptions=True))
    generation_matches(ask([7, 8], session="kept", max_tokens=40), await kept, reference)


async def test_trainer_and_engine_agree(engine: Any, path: Path, tmp_path: Path, model: str):
    """The same tokens through `trainer: torch` with the routing replayed: within 1e-5, and its own routers would have chosen the same."""
    from fixtures.trainers import make_trainer

    from miles_core.batch import Batch
    from miles_core.builder import SampleBuilder
    from miles_core.refs import SampleRef
    from miles_core.sample import SampleId, Status

    samples = []
    for i, p in enumerate(prompts(4)):
        request = ask(p, session=f"t{i}", temperature=1.0)
        builder = SampleBuilder(SampleId("test", "policy", f"p{i}", f"g{i}"), load_tokenizer(path))
        builder.inject_ids(p.tolist(), role="user")
        builder.append(await engine.generate(request), request.sampling)
        samples.append(builder.finish(Status.COMPLETED, prompt=""))
    batch = Batch.of([SampleRef.of(s) for s in samples])
    trainer = make_trainer(path, tmp_path, "torch-padded", None)
    await trainer.start()
    annotated = await trainer.annotate(batch, frozenset({"old_logprobs"}))
    await trainer.close()
    trained = batch.array("loss_mask")
    np.testing.assert_allclose(annotated.array("old_logprobs")[trained], batch.array("logprobs")[trained], atol=1e-5, rtol=0)
