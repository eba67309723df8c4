"""The local engine against transformers: every token's logprob is that of a plain forward pass over the whole sequence, whatever the
engine did to get there (batches, caches in slots, shared prompts, turns, evictions, new weights), and every token is the one that its
uniform number picks from that distribution."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.engines import Brake, Reference

from miles_core.errors import DataError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, GenerateRequest, Generation, SamplingParams
from miles_core.randomness import uniform

VOCABULARY = 61
Engine = Any

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
MOE = TINY | {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 3}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": TINY | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": MOE | {"model_type": "qwen3_moe", "mlp_only_layers": [1]},
    "llama": TINY | {"model_type": "llama"},
    "llama_biased": TINY
    | {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 4,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    }
    | {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64}
    },
    "qwen2": TINY | {"model_type": "qwen2"},
    "mistral": TINY | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 1},
    # Logits are scaled, and positions are learned: nothing of the kind may get lost.
    "granite": TINY | {"model_type": "granite", "logits_scaling": 3.0, "attention_multiplier": 0.3},
    # Keys and values differ in size, and routing is by biased groups.
    "deepseek_v3": MOE
    | {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    | {name: TINY[name] for name in ("initializer_range", "eos_token_id", "bos_token_id", "pad_token_id")},
}


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model with seeded weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(7)
            made[name] = tmp_path_factory.mktemp(name)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]))
            for weight in model.parameters():
                if weight.dim() == 1:  # norms start as ones and biases as zeros, one like another
                    weight.data += 0.03 * torch.randn(weight.shape)
            model.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture
def engine_of(model_path: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """Builds engines as a recipe does."""

    def build(name: str = "qwen3", device: str = "cpu", **options: Any) -> Engine:
        config = config_class("rollout_engine", "local").model_validate({"use": "local", **options})
        path = model_path(name)
        return config.build(BuildContext(run_dir=path, run="test", seed=0, model_path=path, device=device))

    yield build


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


NEAR = 3e-5
"""Log-probabilities in float32 are that near to each other. With weights as large as these (``initializer_range``) one in 50 000 is off by
1e-5, on a processor that adds in another order another one."""
TIE = 1e-5
"""A uniform number this near to a border between two tokens, or two logits this near to each other, decide nothing."""


def check(request: GenerateRequest, generation: Generation, logits: np.ndarray, settled: int | None = None) -> None:
    """Tokens, logprobs and count, given the logits of a plain forward pass over context and generation; as far as its first ``settled``
    rows say."""
    start, n = len(request.tokens), len(generation.tokens)
    assert 1 <= n <= request.sampling.max_tokens
    assert generation.logprobs.dtype == np.float32 and generation.tokens.dtype == np.int32 and generation.versions.dtype == np.int32
    n = n if settled is None else min(n, max(0, settled - start + 1))
    found, rows = generation.tokens[:n], np.arange(n)
    expected = log_softmax(logits[start - 1 : start - 1 + n] / (request.sampling.temperature or 1.0))
    np.testing.assert_allclose(generation.logprobs[:n], expected[rows, found], atol=NEAR, rtol=0)
    if request.sampling.temperature == 0:
        assert (expected[rows, found] >= expected.max(axis=-1) - TIE).all()
    else:
        u, up_to = uniform(np.full(n, request.key, np.uint64), start + rows), np.exp(expected).cumsum(axis=-1)[rows, found]
        assert ((up_to - np.exp(expected[rows, found]) - TIE <= u) & (u <= up_to + TIE)).all()


def check_whole(request: GenerateRequest, generation: Generation, reference: Reference) -> None:
    """``check``, and the experts of all rows, against one model."""
    tokens = sequence(request, generation)
    routed = reference.model.config.model_type == "qwen3_moe"  # what others decide by is not among their outputs
    check(request, generation, reference.logits(tokens), reference.settled(tokens) if routed else None)
    if routed:
        assert len(generation.routing) == len(tokens) - 1
        reference.chose(generation.routing, tokens)


def sequence(request: GenerateRequest, generation: Generation) -> np.ndarray:
    return np.concatenate([request.tokens, generation.tokens])


def ragged_requests(count: int, seed: int = 0, max_tokens: int = 40) -> list[GenerateRequest]:
    rng = np.random.default_rng(seed)
    return [
        GenerateRequest(
            session=f"s{seed}.{i}",
            tokens=rng.integers(0, VOCABULARY, rng.integers(1, 60)).astype(np.int32),
            sampling=SamplingParams(int(rng.integers(1, max_tokens)), temperature=(1.0, 0.7, 1.6, 0.0)[i % 4]),
            key=int(rng.integers(2**63)) * 2 + 1,  # 64 bits
        )
        for i in range(count)
    ]


async def generate_all(engine: Engine, requests: list[GenerateRequest]) -> list[Generation]:
    return await asyncio.gather(*(engine.generate(r) for r in requests))


@pytest.mark.parametrize("name", MODELS)
async def test_ragged_concurrent_requests(name: str, engine_of: Callable[..., Engine], model_path: Callable[[str], Path]) -> None:
    engine, reference, requests = engine_of(name), Reference(model_path(name)), ragged_requests(48)
    for request, generation in zip(requests, await generate_all(engine, requests), strict=True):
        check_whole(request, generation, reference)
        assert len(generation.tokens) == request.sampling.max_tokens and generation.finish == "length"
    assert engine.stats()["fused"] == (MODELS[name]["model_type"] in ("qwen3", "llama", "qwen2", "mistral"))
    await engine.close()


async def test_fewer_slots_than_requests(engine_of: Callable[..., Engine], model_path: Callable[[str], Path]) -> None:
    """Requests wait for slots; sessions between turns lose theirs to those that wait, and come back."""
    engine, reference = engine_of(max_batch=5), Reference(model_path("qwen3"))

    async def play(request: GenerateRequest) -> None:
        for turn in range(3):
            generation = await engine.generate(request)
            check_whole(request, generation, reference)
            await asyncio.sleep(0.002 * (request.key % 3))
            injected = np.arange(turn + 2, dtype=np.int32)
            request = replace(request, tokens=np.concatenate([sequence(request, generation), injected]))

    await asyncio.gather(*(play(r) for r in ragged_requests(23, max_tokens=12)))
    await engine.close()


@pytest.mark.parametrize("injected, prefilled", [(5, 0), (32, 0), (33, 33), (70, 70)])
async def test_turns_run_only_new_tokens(
    injected: int, prefilled: int, engine_of: Callable[..., Engine], model_path: Callable[[str], Path]
) -> None:
    """The last sampled token and the injected ones ride along in decoding steps, or are prefilled (all but the last) if they are many."""
    engine, reference = engine_of(), Reference(model_path("qwen3"))
    requests = ragged_requests(12, max_tokens=10)
    for turn in range(3):
        before = engine.stats()
        generations = await generate_all(engine, requests)
        after = engine.stats()
        for request, generation in zip(requests, generations, strict=True):
            check_whole(request, generation, reference)
        if turn:
            assert after["prefill_tokens"] - before["prefill_tokens"] == prefilled * len(requests)
        more = np.random.default_rng(turn).integers(0, VOCABULARY, injected).astype(np.int32)
        requests = [replace(r, tokens=np.concatenate([sequence(r, g), more])) for r, g in zip(requests, generations, strict=True)]
    await engine.close()


async def test_a_context_that_does_not_extend_the_last(engine_of: Callable[..., Engine], model_path: Callable[[str], Path]) -> None:
    """Compacted, shortened or altogether different contexts in the same session."""
    engine, reference = engine_of("qwen3_moe"), Reference(model_path("qwen3_moe"))
    request = replace(ragged_requests(1)[0], tokens=np.arange(50, dtype=np.int32), sampling=SamplingParams(8))
    contexts = [
        np.arange(50),
        np.arange(20),
        np.concatenate([np.arange(10), np.arange(40, 10, -1)]),
        np.arange(1, 45),
        np.arange(3),
        np.arange(4),
    ]
    for context in contexts:
        request = replace(request, tokens=context.astype(np.int32))
        generation = await engine.generate(request)
        check_whole(request, generation, reference)
    await engine.close()


async def test_alone_or_in_company_the_same_tokens(engine_of: Callable[..., Engine]) -> None:
    engine, requests = engine_of(), ragged_requests(64, seed=5)
    together = await generate_all(engine, requests)
    for request, generation in zip(requests[::7], together[::7], strict=True):
        alone = await engine.generate(replace(request, session="alone"))
        await engine.release("alone")
        np.testing.assert_array_equal(alone.tokens, generation.tokens)
        np.testing.assert_allclose(alone.logprobs, generation.logprobs, atol=NEAR, rtol=0)
    await engine.close()


async def test_a_prompt_that_waits_several_times_is_prefilled_once(
    engine_of: Callable[..., Engine], model_path: Callable[[str], Path]
) -> None:
    engine, reference = engine_of("qwen3_moe"), Reference(model_path("qwen3_moe"))
    prompts = [np.arange(start, start + 40, dtype=np.int32) for start in (0, 7, 20)]
    requests = [GenerateRequest(f"{p}.{i}", prompts[p], SamplingParams(20), key=100 * p + i) for i in range(16) for p in range(3)]
    generations = await generate_all(engine, requests)
    assert engine.stats()["prefill_tokens"] == 3 * 39
    for request, generation in zip(requests, generations, strict=True):
        check_whole(request, generation, reference)
    await engine.close()


@pytest.mark.parametrize("name, max_batch", [("qwen3", 4), ("qwen3_moe", 4), ("qwen3_moe", 64)])
async def test_a_prompt_that_comes_again_is_not_run_again(
    name: str, max_batch: int, engine_of: Callable[..., Engine], model_path: Callable[[str], Path]
) -> None:
    """More requests of one prompt than slots, or than have held it before; their sessions released or not; and a context that goes on
    from another session's. Only what is new is prefilled, until the weights change."""
    engine, reference = engine_of(name, max_batch=max_batch), Reference(model_path(name))
    prompt = np.random.default_rng(3).integers(0, VOCABULARY, 60).astype(np.int32)

    async def prefilled_for(requests: list[GenerateRequest]) -> int:
        before = engine.stats()["prefill_tokens"]
        for request, generation in zip(requests, await generate_all(engine, requests), strict=True):
            check_whole(request, generation, reference)
        return int(engine.stats()["prefill_tokens"] - before)

    def group(name: str, prompt: np.ndarray, count: int = 16) -> list[GenerateRequest]:
        return [GenerateRequest(f"{name}.{i}", prompt, SamplingParams(3 + i % 5), key=i) for i in range(count)]

    assert await prefilled_for(group("first", prompt, 2)) == 59
    for i in range(2):
        await engine.release(f"first.{i}")
    assert await prefilled_for(group("again", prompt)) == 0
    longer = np.concatenate([prompt[:50], np.arange(45, dtype=np.int32)])
    assert await prefilled_for(group("longer", longer)) == 94 - 50
    reference.perturb()
    await engine.update_weights(reference.weights(), 1)
    assert await prefilled_for(group("new weights", prompt)) == 59
    await engine.close()


@pytest.mark.parametrize("name, prefilled", [("qwen3", 0), ("qwen3_moe", 79)])
async def test_a_beginning_held_by_a_sequence_that_saw_new_weights(
    name: str, prefilled: int, engine_of: Callable[..., Engine], model_path: Callable[[str], Path]
) -> None:
    """Its keys and values are of the new weights and are used; not so where its routing, partly of the old ones, would come along."""
    engine, new = engine_of(name), Reference(model_path(name))
    new.perturb()
    prompt = np.random.default_rng(4).integers(0, VOCABULARY, 80).astype(np.int32)
    brake = Brake(engine, 20)
    running = asyncio.create_task(engine.generate(GenerateRequest("long", prompt, SamplingParams(170), key=1)))
    await brake.held()
    updating = asyncio.create_task(engine.update_weights(new.weights(), 1))
    await asyncio.sleep(0)  # it has closed the engine
    brake.release(1)
    await updating
    await brake.held()
    before, request = engine.stats()["prefill_tokens"], GenerateRequest("short", prompt, SamplingParams(5), key=2)
    short = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0)  # it is asked for
    brake.release()
    generation = await short
    assert not running.done() and engine.stats()["prefill_tokens"] - before == prefilled
    check_whole(request, generation, new)
    await running
    await engine.close()


async def test_a_long_context_does_not_hold_up_others(engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """240 tokens are 12 passes of 20, after the one of the short context, and there is a decoding step after each."""
    monkeypatch.setattr("miles_rollout.local.scheduler.PREFILL_TOKENS", 20)
    engine, done = engine_of(), []

    async def one(request: GenerateRequest) -> None:
        await engine.generate(request)
        done.append(request.session)

    long = GenerateRequest("long", np.arange(241, dtype=np.int32) % VOCABULARY, SamplingParams(1), key=1)
    short = GenerateRequest("short", np.arange(10, dtype=np.int32), SamplingParams(25), key=1)
    await asyncio.gather(one(long), one(short))
    assert done == ["short", "long"]
    await engine.close()


async def test_a_long_context_gets_its_turn_under_a_stream_of_short_ones(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clients that ask again at once, each time with another context, which as two fill every pass."""
    monkeypatch.setattr("miles_rollout.local.scheduler.PREFILL_TOKENS", 60)
    engine, rng = engine_of(), np.random.default_rng(3)
    long = asyncio.ensure_future(
        engine.generate(GenerateRequest("long", np.arange(200, dtype=np.int32) % VOCABULARY, SamplingParams(1), 1))
    )

    async def ask_again(client: int) -> int:
        for asked in range(300):
            if long.done():
                return asked
            await engine.generate(
                GenerateRequest(f"{client}-{asked}", rng.integers(0, VOCABULARY, 30).astype(np.int32), SamplingParams(1), 1)
            )
            await engine.release(f"{client}-{asked}")
        return 300

    assert max(await asyncio.gather(*(ask_again(i) for i in range(4)))) < 150  # four passes of 60, one in 16 steps
    await long
    await engine.close()


async def test_a_session_is_not_released_while_its_call_runs(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    running = asyncio.ensure_future(engine.generate(GenerateRequest("a", np.array([1], np.int32), SamplingParams(50), 1)))
    await asyncio.sleep(0)
    with pytest.raises(DataError, match="'a' is released while its call still runs"):
        await engine.release("a")
    assert len((await running).tokens) > 0
    await engine.release("a")
    await engine.close()


@pytest.mark.parametrize("lengths", [[8] * 40, np.random.default_rng(9).integers(1, 40, 33).tolist()], ids=["equal", "random"])
async def test_finished_sequences_are_replaced_at_once(lengths: list[int], engine_of: Callable[..., Engine]) -> None:
    """As many decoding steps as five workers need for a list of jobs who take the next one whenever they are done."""
    engine = engine_of(max_batch=5)
    requests = [GenerateRequest(f"{i}", np.array([i], np.int32), SamplingParams(length), key=i) for i, length in enumerate(lengths)]
    await generate_all(engine, requests)
    busy_until = [0] * 5
    for length in lengths:
        busy_until[busy_until.index(min(busy_until))] += length
    assert engine.stats()["decode_steps"] == max(busy_until)
    await engine.close()


async def test_an_idle_engine_begins_when_all_are_here(engine_of: Callable[..., Engine]) -> None:
    """Requests that come one after the other, while the first could already run, take as many steps as one of them."""
    engine = engine_of(max_batch=16)

    async def later(index: int) -> Generation:
        for _ in range(index):
            await asyncio.sleep(0)
        return await engine.generate(GenerateRequest(f"{index}", np.array([1, index], np.int32), SamplingParams(6), key=index))

    await asyncio.gather(*(later(index) for index in range(12)))
    assert engine.stats()["decode_steps"] == 6
    await engine.close()


async def test_prefill_in_pieces_up_to_the_context_limit(
    engine_of: Callable[..., Engine], model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts longer than a prefill pass takes, beside short ones, and so long that only a few positions are left."""
    monkeypatch.setattr("miles_rollout.local.scheduler.PREFILL_TOKENS", 100)
    engine, reference = engine_of("qwen3_moe"), Reference(model_path("qwen3_moe"))
    rng = np.random.default_rng(8)
    lengths = [255, 254, 3, 250, 120, 119, 1, 30, 2, 200]
    contexts = [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
    requests = [GenerateRequest(f"{i}", context, SamplingParams(8), key=i) for i, context in enumerate(contexts)]
    for request, generation in zip(requests, await generate_all(engine, requests), strict=True):
        check_whole(request, generation, reference)
        assert len(generation.tokens) == min(8, 256 - len(request.tokens)) and generation.finish == "length"
    await engine.close()


async def test_restricted_support(engine_of: Callable[..., Engine], model_path: Callable[[str], Path]) -> None:
    """Support and logprobs against transformers' own logits processors."""
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    engine, reference = engine_of(), Reference(model_path("qwen3"))
    restrictions = [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.05}, {}]
    requests = [
        GenerateRequest(f"{i}", np.arange(i, i + 9, dtype=np.int32), SamplingParams(30, temperature=0.8, **restrictions[i % 5]), key=i)
        for i in range(20)
    ]
    for i, (request, generation) in enumerate(zip(requests, await generate_all(engine, requests), strict=True)):
        sampling = request.sampling
        scores = torch.from_numpy(reference.logits(sequence(request, generation))[8:-1])
        scores = TemperatureLogitsWarper(0.8)(None, scores)
        scores = TopKLogitsWarper(sampling.top_k)(None, scores) if sampling.top_k else scores
        scores = TopPLogitsWarper(sampling.top_p)(None, scores) if sampling.top_p < 1 else scores
        scores = MinPLogitsWarper(sampling.min_p)(None, scores) if sampling.min_p else scores
        expected = log_softmax(scores.numpy())
        np.testing.assert_allclose(generation.logprobs, expected[np.arange(30), generation.tokens], atol=NEAR, rtol=0)
        if i % 5 == 4:
            assert generation.support is None
        else:
            assert generation.support == [np.flatnonzero(np.isfinite(row)).tolist() for row in expected]
    await engine.close()


@pytest.mark.parametrize("restriction", [{}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.6}])
async def test_first_tokens_are_distributed_as_they_should(
    restriction: dict, engine_of: Callable[..., Engine], model_path: Callable[[str], Path]
) -> None:
    """Pearson's χ² over 6,000 keys. Over 61 ids its mean is 60 and its standard deviation 11; a wrong distribution gives hundreds."""
    engine, reference, prompt, n = engine_of(), Reference(model_path("qwen3")), np.array([3, 1, 4, 1, 5], np.int32), 6000
    sampling = SamplingParams(1, **restriction)
    requests = [GenerateRequest(f"{i}", prompt, sampling, key=i * 0x9E3779B97F4A7C15 % 2**64) for i in range(n)]
    generations = await generate_all(engine, requests)
    counts = np.bincount([int(g.tokens[0]) for g in generations], minlength=VOCABULARY)
    probs = np.exp(log_softmax(reference.logits(prompt)[-1] / sampling.temperature))
    if support := generations[0].support:
        assert 1 < len(support[0]) < VOCABULARY
        probs = np.where(np.isin(np.arange(VOCABULARY), support[0]), probs, 0.0)
        probs /= probs.sum()
    assert counts[probs == 0].sum() == 0
    likely = probs * n >= 5  # the others count as one
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(probs[likely], probs[~likely].sum()) * n
    keep = expected > 0
    assert (((observed - expected) ** 2)[keep] / expected[keep]).sum() < 120
    await engine.close()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
async def test_new_weights_in_the_middle(name: str, engine_of: Callable[..., Engine], model_path: Callable[[str], Path]) -> None:
    """Each token has the logprob that the weights of its version give it, the whole context run by these; so has each routing row,
    whose version is that of the token it was recorded for, the next one."""
    engine, old, new = engine_of(name), Reference(model_path(name)), Reference(model_path(name))
    new.perturb()
    requests = [replace(r, sampling=replace(r.sampling, max_tokens=60)) for r in ragged_requests(24)]
    brake = Brake(engine, 24 * 20)
    running = asyncio.gather(*(engine.generate(r) for r in requests))
    await brake.held()
    updating = asyncio.create_task(engine.update_weights(new.weights(), 3))
    await asyncio.sleep(0)  # it has closed the engine
    brake.release()
    await updating
    assert engine.version == 3
    generations = await running
    for request, generation in zip(requests, generations, strict=True):
        tokens, start = sequence(request, generation), len(request.tokens)
        before = int((generation.versions == 0).sum())
        assert 10 < before < 50 and (generation.versions[before:] == 3).all()
        logits = np.concatenate([old.logits(tokens)[: start - 1 + before], new.logits(tokens)[start - 1 + before :]])
        check(request, generation, logits, min(old.settled(tokens), new.settled(tokens)))
        if generation.routing is not None:
            frozen = start + before - 1
            old.chose(generation.routing[:frozen], tokens)
            new.chose(generation.routing[frozen:], tokens, frozen)
    # The next turn: nothing that the old weights left in the cache is used.
    requests = [replace(r, tokens=np.append(sequence(r, g), 5).astype(np.int32)) for r, g in zip(requests, generations, strict=True)]
    for request, generation in zip(requests, await generate_all(engine, requests), strict=True):
        tokens = sequence(request, generation)
        check(request, generation, new.logits(tokens), new.settled(tokens))
    await engine.close()


async def test_routing_over_turns(engine_of: Callable[..., Engine], model_path: Callable[[str], Path]) -> None:
    """The rows of all turns, put end to end as the sample builder does, are those of a plain forward pass: all but the last."""
    engine, reference = engine_of("qwen3_moe", max_batch=6), Reference(model_path("qwen3_moe"))

    async def play(request: GenerateRequest) -> None:
        rows: list[np.ndarray] = []
        for turn in range(4):
            request = replace(request, routing_start=sum(map(len, rows)))
            generation = await engine.generate(request)
            rows.append(generation.routing)
            tokens = sequence(request, generation)
            await asyncio.sleep(0.001 * (request.key % 3))
            injected = np.arange((3, 40, 1)[turn % 3], dtype=np.int32)
            request = replace(request, tokens=np.concatenate([tokens, injected]))
        routing = np.concatenate(rows)
        assert routing.dtype == np.uint8 and routing.shape == (len(tokens) - 1, 2, 2)  # layer 1 of 3 is dense
        reference.chose(routing, tokens)

    await asyncio.gather(*(play(r) for r in ragged_requests(14, max_tokens=8)))
    await engine.close()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
async def test_weights_go_by_the_names_of_the_checkpoint(
    name: str, engine_of: Callable[..., Engine], model_path: Callable[[str], Path]
) -> None:
    """What an engine holds is what safetensors files hold, before and after an update."""
    import torch
    from safetensors.torch import load_file

    engine, other = engine_of(name), Reference(model_path(name))
    stored = load_file(model_path(name) / "model.safetensors")
    held = dict(engine.named_weights())
    assert held.keys() == stored.keys() and all(torch.equal(held[n], stored[n]) for n in stored)
    other.perturb()
    new = other.weights()
    await engine.update_weights(new, 1)
    held = dict(engine.named_weights())
    assert held.keys() == dict(new).keys() and all(torch.equal(held[n], t) for n, t in new)
    await engine.close()


@pytest.mark.parametrize("name", ["qwen3", "llama_biased", "qwen3_moe"])
async def test_weights_in_the_memory_of_the_engine_are_not_copied(
    name: str, engine_of: Callable[..., Engine], model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer may take the engine's tensors as the memory of its parameters: a publish then copies nothing, and what it wrote is
    what is sampled from, though the engine has fused some of them. Foreign tensors are copied as ever."""
    import torch

    engine, reference = engine_of(name), Reference(model_path(name))
    memory = dict(engine.named_weights())
    reference.perturb()
    new = reference.weights()
    with torch.no_grad():
        for weight_name, weight in new:
            memory[weight_name].copy_(weight)
    copies, copy = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source, **options: copies.append(self) or copy(self, source, **options))
    await engine.update_weights(list(engine.named_weights()), 1)
    assert not copies
    requests = ragged_requests(8)
    for request, generation in zip(requests, await generate_all(engine, requests), strict=True):
        check_whole(request, generation, reference)
        assert (generation.versions == 1).all()
    copies.clear()
    await engine.update_weights(new, 2)
    assert len(copies) >= len(new)
    assert all(tensor.data_ptr() == memory[weight_name].data_ptr() for weight_name, tensor in engine.named_weights())
    await engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
async def test_on_a_gpu(name: str, engine_of: Callable[..., Engine], model_path: Callable[[str], Path]) -> None:
    """The same promises on CUDA in float32: logprobs of the CPU's plain forward pass, turn by turn, and new weights from the CPU."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device here")
    torch.backends.cuda.matmul.allow_tf32 = False
    engine, reference = engine_of(name, device="cuda", dtype="float32"), Reference(model_path(name))
    for version in range(2):
        requests = ragged_requests(48, seed=version)
        for turn in range(2):
            for request, generation in zip(requests, generations := await generate_all(engine, requests), strict=True):
                tokens, start = sequence(request, generation), len(request.tokens)
                expected = log_softmax(reference.logits(tokens) / (request.sampling.temperature or 1.0))
                at = np.arange(start, len(tokens))
                np.testing.assert_allclose(generation.logprobs, expected[at - 1, tokens[at]], atol=1e-4)
                assert (generation.versions == version).all()
            more = np.arange((4, 40)[turn], dtype=np.int32)
            requests = [replace(r, tokens=np.concatenate([sequence(r, g), more])) for r, g in zip(requests, generations, strict=True)]
        reference.perturb()
        await engine.update_weights(reference.weights(), version + 1)
    await engine.close()
    half = engine_of(name, device="cuda")
    requests = ragged_requests(64)
    for request, generation in zip(requests, await generate_all(half, requests), strict=True):
        assert len(generation.tokens) == request.sampling.max_tokens and np.isfinite(generation.logprobs).all()
    await half.close()
