"""What the local engine does besides its numbers (tests/differential has these): stops, limits, refusals, failures, the end."""

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.engines import Brake

from miles_core.errors import ConfigError, DataError, InfrastructureFailure, RunError
from miles_core.protocols import GenerateRequest, Generation, SamplingParams


def request(session: str = "s", tokens: list[int] | None = None, key: int = 1, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(session, np.array(tokens or [3, 4, 5], np.int32), SamplingParams(**{"max_tokens": 16} | sampling), key)


def biased(engine: Any, scale: float = 0.0) -> Iterator[tuple[str, torch.Tensor]]:
    """The engine's weights with a part taken away: 0 leaves a uniform distribution."""
    for name, weight in engine.named_weights():
        yield name, weight * scale if name == "model.norm.weight" else weight


async def many(engine: Any, n: int, **sampling: Any) -> list[Generation]:
    return await asyncio.gather(*(engine.generate(request(f"{i}", key=i, **sampling)) for i in range(n)))


# What ends a generation


async def test_end_of_text_and_stop_ids_end_it_and_stay_part_of_it(tiny: Any):
    engine, eos, stop = tiny.engine(), tiny.tokenizer.eos_token_id, 7
    await engine.update_weights(biased(engine), 0)  # uniform: both come soon
    seen = set()
    for generation in await many(engine, 60, max_tokens=20, stop_token_ids=(stop,)):
        ends = np.isin(generation.tokens, [eos, stop])
        assert not ends[:-1].any()
        assert generation.finish == ("stop" if ends[-1] else "length")
        assert ends[-1] or len(generation.tokens) == 20
        seen.add(int(generation.tokens[-1]) if ends[-1] else None)
    assert seen == {eos, stop, None}
    await engine.close()


@pytest.mark.parametrize("stop", [("a</res>",), ("bab", "g</res>"), ("é",), ("stop", "re a"), (" ", "zz"), ("ab ",)])
async def test_stop_texts_end_it_as_soon_as_they_appear(stop: tuple[str, ...], tiny: Any):
    """Within a token, over several tokens, ending in white space; compared with decoding everything after every token."""
    engine = tiny.engine(tiny.context())
    await engine.update_weights(biased(engine), 0)
    finished = 0
    for generation in await many(engine, 200, max_tokens=40, stop=stop):
        tokens = generation.tokens.tolist()
        found = [any(text in tiny.tokenizer.decode(tokens[:n]) for text in stop) for n in range(1, len(tokens) + 1)]
        assert not any(found[:-1])
        finished += found[-1]
        assert (generation.finish == "stop") == (found[-1] or tokens[-1] == tiny.tokenizer.eos_token_id)
    assert finished > 3
    await engine.close()


async def test_stop_texts_count_only_what_was_generated(tiny: Any):
    """The context ends with the first half of the stop text."""
    engine = tiny.engine()
    await engine.update_weights(biased(engine), 0)
    a, b = tiny.tokenizer.encode("a")[0], tiny.tokenizer.encode("b")[0]
    asked = [replace(request(f"{i}", [3, a], key=i, stop=("ab",)), session=f"{i}") for i in range(200)]
    firsts = [g for g in await asyncio.gather(*(engine.generate(r) for r in asked)) if g.tokens[0] == b]
    assert firsts and all(len(g.tokens) > 1 for g in firsts)
    await engine.close()


async def test_the_context_limit_ends_it(tiny: Any):
    engine = tiny.engine(max_length=20)
    generation = await engine.generate(request(tokens=[3] * 15, max_tokens=100, stop_token_ids=()))
    assert generation.finish in ("length", "stop") and len(generation.tokens) <= 5
    await engine.update_weights(biased(engine), 0)
    lengths = [len(g.tokens) for g in await many(engine, 20, max_tokens=100)]
    assert max(lengths) == 17  # 3 + 17 = 20
    last = await engine.generate(request(tokens=[3] * 19))
    assert len(last.tokens) == 1
    await engine.close()


# Refusals


@pytest.mark.parametrize(
    "bad, message",
    [
        (request("who", [3, 99, 4]), r"'who'.*token 99 at index 1.*vocabulary of 18"),
        (request("who", [3, 4, -1]), r"'who'.*token -1 at index 2"),
        (replace(request("who"), tokens=np.zeros(0, np.int32)), r"'who'.*empty"),
        (replace(request("who"), tokens=np.zeros(3, np.int64)), r"'who'.*int32"),
        (request("who", [3] * 128), r"'who'.*128 tokens.*no room.*128"),
        (request("who", max_tokens=0), r"'who'.*out of range.*max_tokens=0"),
        (request("who", stop=("x", "")), r"'who'.*out of range.*stop=\('x', ''\)"),
        (request("who", temperature=-1.0), r"'who'.*out of range.*temperature=-1"),
        (request("who", top_p=0.0), r"'who'.*out of range.*top_p=0"),
        (request("who", key=-1), r"'who'.*out of range.*key=-1"),
        (replace(request("who"), routing_start=4), r"'who'.*out of range.*routing_start=4"),
    ],
)
async def test_bad_requests_are_refused_and_harm_nobody(bad: GenerateRequest, message: str, tiny: Any):
    engine = tiny.engine()
    good = asyncio.create_task(engine.generate(request("good")))
    with pytest.raises(DataError, match=message):
        await engine.generate(bad)
    assert len((await good).tokens) >= 1
    await engine.close()


async def test_a_session_has_one_call_at_a_time(tiny: Any):
    engine = tiny.engine()
    first = asyncio.create_task(engine.generate(request()))
    await asyncio.sleep(0)
    with pytest.raises(DataError, match="'s' has a call running already"):
        await engine.generate(request())
    await first
    await engine.generate(request())
    await engine.close()


async def test_stop_texts_need_a_tokenizer(tiny: Any):
    engine = tiny.engine(tiny.context(tokenizer=None))
    with pytest.raises(ConfigError, match=r"stop texts .*'x'.* need a tokenizer"):
        await engine.generate(request(stop=("x",)))
    await engine.close()


def test_max_length_beyond_the_positions(tiny: Any):
    with pytest.raises(ConfigError, match="max_length is 500, but the model has 128 positions"):
        tiny.engine(max_length=500)


SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
}


@pytest.mark.parametrize(
    "model_type, fields, message",
    [
        ("mistral", {"sliding_window": 8}, "not full attention.*DynamicSlidingWindowLayer"),
        ("mamba", {"state_size": 4, "head_dim": None, "num_key_value_heads": None}, "not full attention|Mamba"),
        ("bert", {"is_decoder": False}, "gives other logits than by itself"),  # sees tokens to come
        ("bloom", {}, "does not run with its cache in slots"),  # makes its biases from a mask of padding
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 16}, "does not return the experts it chose"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' rotary positions"),
    ],
)
def test_models_whose_numbers_would_be_wrong_are_refused(
    model_type: str, fields: dict, message: str, tiny: Any, save_model: Callable[..., Path]
):
    given = {name: value for name, value in (SMALL | fields).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        tiny.engine(tiny.context(model_path=save_model(model_type, **given), tokenizer=None), max_length=64)


def test_a_directory_without_a_model(tiny: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        tiny.engine(tiny.context(model_path=tmp_path))


# Failures and the end


async def test_weights_that_diverged_are_an_error_for_every_caller(tiny: Any):
    engine = tiny.engine(max_batch=4)
    good = list(biased(engine, 1.0))
    await engine.update_weights(biased(engine, torch.nan), 1)
    results = await asyncio.gather(*(engine.generate(request(f"{i}")) for i in range(9)), return_exceptions=True)
    assert all(isinstance(r, RunError) and "not finite" in str(r) for r in results)
    await engine.update_weights(good, 2)
    assert (await engine.generate(request())).versions[0] == 2
    await engine.close()


class BreakingTokenizer:
    """Decodes single tokens, then breaks."""

    eos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0]

    def decode(self, token_ids: list[int]) -> str:
        if len(token_ids) > 1:
            raise OSError("the disk is gone")
        return "x"

    def __len__(self) -> int:
        return 18

    def __deepcopy__(self, memo: dict) -> "BreakingTokenizer":
        return copy.copy(self)


async def test_a_failing_step_reaches_every_caller_and_the_engine_goes_on(tiny: Any):
    """Running, waiting for a slot, or arriving meanwhile; each gets an error of its own."""
    engine = tiny.engine(tiny.context(tokenizer=BreakingTokenizer()), max_batch=3)
    calls = [engine.generate(request("stops", stop=("x.x",), key=4)), *(engine.generate(request(f"{i}")) for i in range(8))]
    results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
    assert all(isinstance(r, InfrastructureFailure) and "OSError: the disk is gone" in str(r) for r in results)
    assert len({id(r) for r in results}) == 9 and isinstance(results[0].__cause__, OSError)
    assert len((await engine.generate(request("0"))).tokens) >= 1
    await engine.close()


async def test_a_cancelled_caller_frees_its_slot(tiny: Any):
    engine = tiny.engine(max_batch=1)
    await engine.update_weights(biased(engine), 0)
    brake = Brake(engine, 3)
    long = asyncio.create_task(engine.generate(request("long", max_tokens=120, temperature=0)))  # always token 0: no end of text
    await brake.held()
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    brake.release()
    await asyncio.wait_for(engine.generate(request("other", max_tokens=2)), 20)
    await asyncio.wait_for(engine.generate(request("long", max_tokens=2)), 20)  # the same session may come again
    assert engine.stats()["decode_steps"] < 60  # of 120 that the cancelled call had asked for
    await engine.release("unknown")
    await engine.close()


async def test_close_ends_calls_and_thread(tiny: Any):
    engine = tiny.engine()
    await engine.update_weights(biased(engine), 0)
    assert len(await many(engine, 3)) == 3
    assert [t for t in threading.enumerate() if t.name.startswith("miles-local-engine")]
    waiting = [asyncio.create_task(engine.generate(request(f"{i}", max_tokens=120, temperature=0))) for i in range(3)]
    await asyncio.sleep(0)
    await engine.close()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)
    assert all(isinstance(r, InfrastructureFailure) and str(r) == "the engine was closed" for r in results)
    assert not [t for t in threading.enumerate() if t.name.startswith("miles-local-engine")]
    assert not [t for t in asyncio.all_tasks() if t.get_name() == "miles-local-engine"]
    await engine.close()
    with pytest.raises(RunError, match="closed"):
        await engine.generate(request())
    with pytest.raises(RunError, match="closed"):
        await engine.update_weights([], 1)


def test_an_engine_outlives_an_event_loop(tiny: Any):
    engine = tiny.engine()

    async def once() -> Generation:
        return await asyncio.wait_for(engine.generate(request()), 20)

    first, second = asyncio.run(once()), asyncio.run(once())
    np.testing.assert_array_equal(first.tokens, second.tokens)
    asyncio.run(engine.close())


async def test_the_event_loop_stays_alive_and_idle_means_idle(tiny: Any):
    engine = tiny.engine()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    await many(engine, 64, max_tokens=60)
    assert ticks > 5
    ticking.cancel()
    steps = engine.stats()["decode_steps"]
    await asyncio.sleep(0.05)
    assert engine.stats()["decode_steps"] == steps
    await engine.close()


async def test_stats_count(tiny: Any):
    engine = tiny.engine()
    generations = await many(engine, 10)
    stats = engine.stats()
    assert stats["generated_tokens"] == sum(len(g.tokens) for g in generations)
    assert stats["prefill_tokens"] == 2  # one prompt of three tokens, all but the last
    assert stats["decode_steps"] == max(len(g.tokens) for g in generations)
    assert 0 < stats["seconds_busy"] < 60 and stats["fused"] == 1
    await engine.close()


# Weights


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w[:3] + w[4:], r"1 weights are missing, the first is 'model\.layers\.0\."),
        (lambda w: [*w, ("model.extra", w[0][1])], r"'model\.extra' is unknown"),
        (lambda w: [(w[0][0], w[0][1][:-1]), *w[1:]], r"'model\.embed_tokens\.weight' is torch\.float32 \[17, 64\].*\[18, 64\]"),
        (lambda w: [*w[:-1], (w[-1][0], w[-1][1].bfloat16())], r"'model\.norm\.weight' is torch\.bfloat16"),
        (lambda w: [*w, w[0]], r"'model\.embed_tokens\.weight' comes twice"),
        (lambda w: [*w, ("lm_head.weight", w[0][1])], r"'lm_head\.weight' comes twice"),
    ],
)
async def test_an_update_that_does_not_fit_changes_nothing(change: Callable, message: str, tiny: Any):
    engine = tiny.engine()
    before = [(name, weight.clone()) for name, weight in engine.named_weights()]
    with pytest.raises(DataError, match=message):
        await engine.update_weights(change([(name, weight + 1) for name, weight in before]), 5)
    assert engine.version == 0
    assert all(torch.equal(weight, old) for (_, weight), (_, old) in zip(engine.named_weights(), before, strict=True))
    await engine.close()


async def test_tied_weights_come_under_either_name(tiny: Any):
    engine = tiny.engine()
    held = list(engine.named_weights())
    assert "lm_head.weight" not in dict(held)
    await engine.update_weights([("lm_head.weight", held[0][1] * 2), *((n, w.clone()) for n, w in held[1:])], 1)
    assert engine.version == 1 and torch.equal(dict(engine.named_weights())["model.embed_tokens.weight"], held[0][1])
    await engine.close()
