"""What LoRA costs and saves beside training all weights: a step, decoding, memory of the optimizer, bytes of a publish. On a CPU.

    uv run --locked python benchmarks/lora.py [--model 30m] [--rank 8] [--repeats 7]

One trainer and one engine of each kind over the same model, batch and prompts, taking turns; seconds are the process's own (CPU). A step is
the whole call of TorchTrainer.step; decoding is 64 answers of 32 tokens, asked for at once. Ratios are LoRA / all weights.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from _machine import interleave, median_ratio, summary, write_result
from miles_core.batch import Batch
from miles_core.lora import Lora
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, GenerateRequest, LossTerm, SamplingParams
from torch_step import COMMON, MODELS, batch_of

ANSWERS, LENGTH = 64, 32


def loss(inputs: Any) -> Any:
    """PPO's, unclipped: what a step costs does not depend on it."""
    from miles_core.protocols import LossOutputs

    ratio = (inputs.logprobs - inputs.logprobs.detach()).exp()
    return LossOutputs(-ratio * inputs.columns["advantages"])


def token_mean(ops: Any) -> torch.Tensor:
    """Every trained token counts the same."""
    return torch.full(ops.mask.shape, 1 / ops.tokens, dtype=torch.float64)


def build(path: Path, lora: Lora | None) -> tuple[Any, Any]:
    """A trainer and an engine."""
    trainer = config_class("trainer", "torch").model_validate({"use": "torch", "gates": {"mismatch": float("inf"), "ess": 0.0}})
    engine = config_class("rollout_engine", "local").model_validate({"use": "local", "max_length": 256})
    context = BuildContext(path.parent, "bench", 0, "policy", path, lora=lora)
    of_training = BuildContext(
        path.parent, "bench", 0, "policy", path, losses={"ppo": LossTerm(loss)}, aggregation=token_mean, total_steps=1, lora=lora
    )
    return trainer.build(of_training), engine.build(context)


def step_seconds(trainer: Any, batch: Batch) -> float:
    began = time.process_time()
    asyncio.run(trainer.step(batch))
    return time.process_time() - began


def decode_seconds(engine: Any, vocab: int) -> float:
    rng = np.random.default_rng(0)
    asked = [
        GenerateRequest(f"s{i}", rng.integers(2, vocab, 12).astype(np.int32), SamplingParams(LENGTH, stop_token_ids=()), i)
        for i in range(ANSWERS)
    ]

    async def everything() -> None:
        await asyncio.gather(*(engine.generate(request) for request in asked))
        for request in asked:
            await engine.release(request.session)

    began = time.process_time()
    asyncio.run(everything())
    return time.process_time() - began


def bytes_of(trainer: Any, directory: Path) -> dict[str, int]:
    """Of a publish, and of AdamW's moments (as float32 they are what a cut holds beside the weights)."""
    asyncio.run(trainer.save(directory))
    return {
        "publish": sum(t.numel() * t.element_size() for _, t in trainer.named_weights()),
        "moments": (directory / "optimizer.safetensors").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen3", **MODELS[given.model], **COMMON)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        made = {"all": build(path, None), "lora": build(path, Lora(str(path), rank=given.rank, alpha=2 * given.rank))}
        batch, vocab = batch_of(given.model), config.vocab_size
        cases: dict[str, Callable[[], float]] = {}
        for name, (trainer, engine) in made.items():
            cases[f"step {name}"] = partial(step_seconds, trainer, batch)
            cases[f"decode {name}"] = partial(decode_seconds, engine, vocab)
        measured = interleave(cases, given.repeats)
        sizes = {name: bytes_of(trainer, Path(directory) / name) for name, (trainer, _) in made.items()}
        for trainer, engine in made.values():
            asyncio.run(trainer.close())
            asyncio.run(engine.close())
    ratios = {what: median_ratio(measured[f"{what} lora"], measured[f"{what} all"]) for what in ("step", "decode")}
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.2f} of all weights' CPU seconds")
    print(sizes)
    seconds = {name: summary(values) for name, values in measured.items()}
    where = write_result(f"lora_{given.model}", {"ratios": ratios, "seconds": seconds, "bytes": sizes}, ("torch", "transformers", "peft"))
    print(where)


if __name__ == "__main__":
    main()
