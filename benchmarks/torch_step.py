"""One step of `trainer: torch` beside the bare loop over the same model and the same packed batch, on CPU.

    uv run --locked python benchmarks/torch_step.py [--model 30m] [--threads 1]

Ours is the whole call of TorchTrainer.step: columns, planning, layout, forward and backward with log-probabilities and entropies, PPO's
loss, its metrics, gates' numbers, norm, clip, AdamW. The bare loop is what a script would do, as fast as we can write it: everything but
forward, loss, backward, clip and fused AdamW is done beforehand. `bare` has the micro-batches and layouts that ours chose, and takes its
log-probabilities with linear_logprob: the bound of 1.05 is for this one. `bare_padded` is a script without our layouts: samples sorted by
length and padded, transformers' own attention, cross-entropy of whole logits. All take turns. Ratios are ours / theirs.

Each layout is measured too, beside what planning.Costs says of it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from _machine import ROOT, interleave, median_ratio, summary, write_result
from miles_core.assembly import build_trainer
from miles_core.batch import Batch
from miles_core.config import RunConfig
from miles_core.protocols import BuildContext
from miles_core.refs import SampleRef
from miles_core.sample import Sample, SampleId, SamplingSpan
from miles_kernels.ops.linear_logprob import linear_logprob
from miles_train.torch_trainer import attention, layouts, planning
from miles_train.torch_trainer.trainer import TorchTrainer

BOUND = 1.05
COMMON = dict(tie_word_embeddings=True, max_position_embeddings=4096)
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=38, hidden_size=96, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=24
    ),
    "30m": dict(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
}
"""The quick start's model, and one of 30 M parameters."""
SHAPES = {"tiny": (16, 16, 13, 6, 24), "30m": (2, 8, 64, 32, 192)}
"""Groups, answers of each, tokens of a prompt, fewest and most of an answer."""


def batch_of(name: str) -> Batch:
    """Random groups whose answers are all trained."""
    rng = np.random.default_rng(0)
    groups, size, prompt, low, high = SHAPES[name]
    vocab, refs = MODELS[name]["vocab_size"], []
    for g in range(groups):
        begin = rng.integers(0, vocab, prompt)
        for i in range(size):
            tokens = np.concatenate([begin, rng.integers(0, vocab, rng.integers(low, high + 1))])
            sampled = np.arange(len(tokens)) >= prompt
            sample = Sample.of(
                SampleId("bench", "policy", f"p{g}", f"g{g}", i, 0),
                tokens,
                versions=sampled - 1,
                loss_mask=sampled,
                logprobs=np.where(sampled, -np.log(vocab), np.nan),
                spans=[SamplingSpan(prompt, len(tokens), 1.0)],
            )
            refs.append(SampleRef.of(sample))
    batch = Batch.of(refs)
    return batch.with_columns({"advantages": rng.standard_normal(len(batch))[batch.segment].astype(np.float32)})


def build(path: Path, cluster: Any = None, **options: Any) -> Any:
    """The trainer as a run builds it: in this process, or over the ranks of a cluster."""
    trainer = {"use": "torch", "gates": {"mismatch": float("inf"), "ess": 0.0}, "weight_decay": 0.0, **options}
    losses = {"ppo": {"use": "ppo_clip", "old": "current"}}
    policy = {"path": str(path), "losses": losses, "advantage": "grpo", "engine": "local", "trainer": trainer}
    stage: dict[str, Any] = {"steps": 1, "groups": 1, "data": {"use": "texts", "texts": ["-"]}, "models": {"policy": policy}}
    stage |= {"rollout": {"use": "trajectories", "sampling": {"max_tokens": 1}}}
    config = RunConfig.from_mapping({"name": "bench", "trackers": {}, "stages": {"main": stage}}).stages["main"]
    context = BuildContext(path.parent, "bench", 0, "policy", path, total_steps=1, stage=config, cluster=cluster)
    return build_trainer(config.models["policy"], context)


def ppo(logprobs: torch.Tensor, advantages: torch.Tensor, tokens: int) -> torch.Tensor:
    """PPO's loss from the present weights, a part of the step's token mean."""
    ratio = (logprobs - logprobs.detach()).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / tokens


def optimizer_of(model: Any) -> Callable[[], None]:
    """Clip, AdamW, forget the gradient."""
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(parameters, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return update


def bare(path: Path, batch: Batch, ours: TorchTrainer) -> Callable[[], float]:
    """The bare loop over the micro-batches and layouts of ``ours``; it returns its loss."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention.NAME).eval()
    made: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for part in ours.model.micro_batches(batch, np.arange(len(batch)), ours.config.micro_batch_tokens):
        micro, given = part.batch, part.layout
        options: dict[str, Any] = {"input_ids": torch.from_numpy(given.tokens)}
        if given.places is not None:
            options["position_ids"] = torch.from_numpy(given.positions)
            options["blocks"] = attention.Blocks(tuple(map(torch.from_numpy, given.blocks)), torch.from_numpy(given.places))
        rows = np.flatnonzero(micro.array("loss_mask"))
        made.append((options, *_columns(micro, given, rows)))
    update = optimizer_of(model)

    def step() -> float:
        total = 0.0
        for options, where, targets, advantages in made:
            hidden = F.embedding(where, model.model(use_cache=False, **options).last_hidden_state.flatten(0, 1))
            loss = ppo(linear_logprob(hidden, model.lm_head.weight, targets).logprob, advantages, batch.segments.tokens)
            loss.backward()
            total += float(loss.detach())
        update()
        return total

    return step


def _columns(micro: Batch, given: layouts.Layout, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the trained rows are, what they predict, and their advantages; [R] each."""
    targets, advantages = micro.array("targets")[rows].astype(np.int64), micro.array("advantages")[rows]
    return torch.from_numpy(given.where[rows]), torch.from_numpy(targets), torch.from_numpy(advantages)


def bare_padded(path: Path, batch: Batch, max_tokens: int) -> Callable[[], float]:
    """A script that sorts by length and pads; it returns its loss."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    order, made = np.argsort(batch.lengths, kind="stable"), []
    size = max(1, max_tokens // int(batch.lengths.max()))
    for start in range(0, len(order), size):
        micro = batch.select(order[start : start + size])
        given = layouts.lay_out(micro, "padded")
        rows = np.flatnonzero(micro.array("loss_mask"))
        made.append((torch.from_numpy(given.tokens), *_columns(micro, given, rows)))
    update = optimizer_of(model)

    def step() -> float:
        total = 0.0
        for tokens, where, targets, advantages in made:
            hidden = model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            loss = ppo(-F.cross_entropy(model.lm_head(hidden[where]), targets, reduction="none"), advantages, batch.segments.tokens)
            loss.backward()
            total += float(loss.detach())
        update()
        return total

    return step


def timed(step: Callable[[], Any]) -> Callable[[], float]:
    """CPU seconds of a step, all threads together where there are several: neighbours on the machine count for less."""

    def run() -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    for name, default in dict(micro_batch_tokens=2048, threads=1, repeats=9).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        torch.manual_seed(0)
        path = Path(directory) / "model"
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **MODELS[args.model], **COMMON)).save_pretrained(path)
        batch = batch_of(args.model)
        trainers = {n: build(path, layout=n, micro_batch_tokens=args.micro_batch_tokens) for n in ("auto", "padded", "packed", "shared")}
        for trainer in trainers.values():  # each thread has a number of its own
            trainer._worker.submit(torch.set_num_threads, args.threads).result()
        loaded = batch.load(trainers["auto"].model.reads)
        steps: dict[str, Callable[[], Any]] = {
            "bare": bare(path, loaded, trainers["auto"]),
            "bare_padded": bare_padded(path, loaded, args.micro_batch_tokens),
        }
        expected = runner.run(trainers["auto"].step(batch)).metrics["loss"]
        for name, step in steps.items():  # they are the same computation, or there is nothing to compare
            assert abs(step() - expected) < 1e-4 * abs(expected), (name, expected)
        steps |= {name: (lambda trainer=trainer: runner.run(trainer.step(batch))) for name, trainer in trainers.items()}
        seconds = interleave({name: timed(step) for name, step in steps.items()}, args.repeats)
        each, costs = np.arange(len(batch)), trainers["auto"].model.costs
        told = {n: planning.planned(loaded, each, args.micro_batch_tokens, n, costs)[1] / 1e9 for n in ("padded", "packed", "shared")}
    result: dict[str, Any] = {"benchmark": "torch_step", **vars(args), "bound": BOUND}
    result |= {"rows": batch.n_rows, "trained": batch.segments.tokens, "cpu_seconds": {n: summary(v) for n, v in seconds.items()}}
    result["expected_seconds"] = {n: round(x, 4) for n, x in told.items()}
    for name in ("bare", "bare_padded"):
        result[f"ratio_to_{name}"] = round(median_ratio(seconds["auto"], seconds[name]), 3)
    for name, values in seconds.items():
        print(f"{name:12} {summary(values)['median']:.4f} CPU-s" + (f", expected {told[name]:.4f}" if name in told else ""))
    print(f"ours / bare: {result['ratio_to_bare']:.3f}   ours / bare_padded: {result['ratio_to_bare_padded']:.3f}")
    path = write_result(
        f"torch_step_{args.model}" + (f"_{args.threads}_threads" if args.threads > 1 else ""), result, ("torch", "transformers")
    )
    print(f"written to {path.relative_to(ROOT)}")
    return 0 if result["ratio_to_bare"] <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
