"""Tokens per CPU-second of the local engine beside transformers' `generate`, over the quick start's model and one of Llama's shape.

    OMP_NUM_THREADS=1 uv run --locked python benchmarks/local_engine.py

One thread, processor time of the whole process, taking turns. 16 samples a prompt, at most 64 new tokens. Qwen3 and Llama take the
engine's fused step, Granite (Llama with other scales) stands for all that run module by module. Two jobs:

- `rollout`: prompts of 5 to 13 tokens; sequences stop at the end of text (after 28 tokens on average; only tokens up to it count).
- `full`: all prompts of 9 tokens, no end of text, every sequence gets 64: nothing to pad, mask or compact, the best case of `generate`.

The engine gets one request a sample, all at once, and returns logprobs and versions too; `generate` gets the batch (prompts padded on the
left) and returns tokens. Ratios are engine / generate: above 1 the engine wins.

`floor` is what nobody who runs this model step by step with torch on a CPU can leave out: the products with the weights and attention, at
the shapes of the engine's own steps (rows that are finished are gone), by the fastest forms we know, and nothing else: no norms,
rotations, activations, writes to the cache, no sampling, no logprobs. `at_best` is floor / generate: the ratio if all of that cost nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from _machine import ROOT, interleave, median_ratio, summary, write_result
from miles_core.protocols import BuildContext, GenerateRequest, SamplingParams
from miles_kernels.registry import backend
from miles_rollout.local.engine import LocalEngine
from miles_rollout.plugins import LocalEngineConfig

PAD, EOS, VOCABULARY, NEW_TOKENS, GROUP = 0, 1, 38, 64, 16
MODEL_TYPES = ("qwen3", "llama", "granite")
PROMPT_LENGTHS = {"rollout": (5, 13), "full": (9, 9)}


def save_model(directory: Path, job: str, model_type: str) -> Path:
    """The quick start's model (0.225 M parameters), untrained, in the shape of a ``model_type``."""
    torch.manual_seed(0)
    path = directory / model_type / job
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=PAD,
        eos_token_id=EOS if job == "rollout" else None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def prompts(job: str, batch: int) -> list[np.ndarray]:
    """int32 [T] each, every prompt GROUP times."""
    rng = np.random.default_rng(0)
    least, most = PROMPT_LENGTHS[job]
    distinct = [rng.integers(2, VOCABULARY, rng.integers(least, most + 1), dtype=np.int32) for _ in range(batch // GROUP)]
    return [prompt for prompt in distinct for _ in range(GROUP)]


class Floor:
    """Products and attention of decoding steps, on random numbers in the shapes of a model's."""

    def __init__(self, config: Any, slots: int, length: int) -> None:
        heads, self.heads_kv, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        outputs = (((heads + 2 * self.heads_kv) * head_dim, hidden), (hidden, heads * head_dim), (2 * inner, hidden), (hidden, inner))
        self.layers = [
            ([torch.randn(*shape) for shape in outputs], *(torch.randn(slots * self.heads_kv, length, head_dim) for _ in range(2)))
            for _ in range(config.num_hidden_layers)
        ]
        self.head = torch.randn(config.vocab_size, hidden)
        self.inputs = {width: torch.randn(slots, width) for width in (hidden, heads * head_dim, inner)}
        self.query = torch.randn(slots * self.heads_kv, heads // self.heads_kv, head_dim)
        self.product = backend("linear", torch.device("cpu")).product

    def step(self, rows: int, length: int) -> None:
        """One token of each row, over ``length`` positions."""
        query = self.query[: rows * self.heads_kv]
        for weights, keys, values in self.layers:
            for weight in weights:
                self.product(self.inputs[weight.shape[1]][:rows], weight)
            scores = torch.bmm(query, keys[: len(query), :length].transpose(1, 2))
            torch.bmm(torch.softmax(scores, dim=-1), values[: len(query), :length])
        self.product(self.inputs[self.head.shape[1]][:rows], self.head)


class Sampling:
    """Both ways to sample a batch, and the floor; each returns tokens per second of processor time."""

    def __init__(self, path: Path, job: str) -> None:
        self.job = job
        context = BuildContext(run_dir=path, run="benchmark", seed=0, model_path=path)
        self.engine = LocalEngine(LocalEngineConfig(use="local"), context)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path).eval()
        self.loop = asyncio.new_event_loop()
        self.round = 0
        self.lengths: dict[int, list[int]] = {}  # of what the engine sampled last, by batch
        self.floors: dict[int, Floor] = {}

    def local_engine(self, batch: int) -> float:
        self.round += 1
        contexts, sampling = prompts(self.job, batch), SamplingParams(NEW_TOKENS)

        async def one(index: int) -> int:
            session = f"{self.round}.{index}"
            generation = await self.engine.generate(GenerateRequest(session, contexts[index], sampling, key=self.round * batch + index))
            await self.engine.release(session)
            return len(generation.tokens)

        async def everything() -> list[int]:
            return await asyncio.gather(*(one(index) for index in range(batch)))

        began = time.process_time()
        self.lengths[batch] = self.loop.run_until_complete(everything())
        return sum(self.lengths[batch]) / (time.process_time() - began)

    @torch.inference_mode()
    def floor(self, batch: int) -> float:
        if batch not in self.floors:
            self.floors[batch] = Floor(self.model.config, batch, max(PROMPT_LENGTHS[self.job]) + NEW_TOKENS)
            self.local_engine(batch)
        contexts, lengths = np.array([len(context) for context in prompts(self.job, batch)]), np.array(self.lengths[batch])
        steps = [(int((lengths > step).sum()), int(contexts[lengths > step].max()) + step) for step in range(lengths.max())]
        began = time.process_time()
        for rows, length in steps:
            self.floors[batch].step(rows, length)
        return float(lengths.sum()) / (time.process_time() - began)

    @torch.inference_mode()
    def generate(self, batch: int) -> float:
        self.round += 1
        contexts = prompts(self.job, batch)
        width = max(map(len, contexts))
        inputs = torch.from_numpy(np.stack([np.pad(c, (width - len(c), 0), constant_values=PAD) for c in contexts]).astype(np.int64))
        torch.manual_seed(self.round)
        began = time.process_time()
        output = self.model.generate(
            inputs, attention_mask=(inputs != PAD).long(), do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=PAD
        )
        seconds = time.process_time() - began
        new = output[:, width:].numpy()
        ended = (new == EOS) & (self.job == "rollout")
        lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, new.shape[1])
        return float(lengths.sum() / seconds)

    def close(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODEL_TYPES, nargs="+", default=MODEL_TYPES)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {"benchmark": "local_engine", **vars(args), "unit": "tokens per CPU-second", "new_tokens": NEW_TOKENS}
    with tempfile.TemporaryDirectory() as directory:
        for model_type, job, batch in itertools.product(args.models, PROMPT_LENGTHS, args.batches):
            ways = Sampling(save_model(Path(directory), job, model_type), job)
            rates = interleave({w: partial(getattr(ways, w), batch) for w in ("local_engine", "generate", "floor")}, args.repeats)
            ratio, at_best = (median_ratio(rates[way], rates["generate"]) for way in ("local_engine", "floor"))
            fused = bool(ways.engine.stats()["fused"])
            result[f"{model_type}/{job}/{batch}"] = {
                "rates": {way: summary(measured) for way, measured in rates.items()},
                "ratio": round(ratio, 2),
                "at_best": round(at_best, 2),
                "fused": fused,
            }
            medians = {way: round(summary(measured)["median"]) for way, measured in rates.items()}
            print(
                f"{model_type} ({'fused' if fused else 'modules'}), {job}, batch {batch}: × {ratio:.2f}, at best × {at_best:.2f} "
                f"({medians['local_engine']} against {medians['generate']} tokens per CPU-second)"
            )
            ways.close()
    path = write_result("local_engine", result, ("torch", "transformers", "miles-rollout"))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
