"""One step of `trainer: megatron` beside the bare megatron-core loop over the same model and the same packed micro-batches, on CPU ranks.

    uv run --locked python benchmarks/megatron_step.py [--layout tensor=2]

The bare loop is what a script on megatron-core does, on the same ranks: its own copy of the model in DistributedDataParallel, micro-batches
made into tensors beforehand, forward_backward_func, negative log-likelihood, clip, AdamW. Ours is the whole call
of MegatronTrainer.step: cutting, sending, the same forward and backward with log-probabilities and entropies, gates' numbers, norm, clip,
AdamW. Both are timed by the controller, taking turns. `bare` takes its log-probabilities with linear_logprob, as ours does: a loss of the
same kind, for which the bound is 1.05. `bare_cross_entropy` keeps whole logits and knows no entropies: what our op's memory costs in time
shows there, and falls with the head's part in the model. Ratios are ours / bare.
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

from _machine import ROOT, interleave, median_ratio, summary, write_result
from miles_core.batch import Batch
from miles_core.clusters import ProcessesConfig
from miles_core.config import RunConfig
from miles_core.protocols import BuildContext
from miles_core.refs import SampleRef
from miles_core.sample import Sample, SampleId, SamplingSpan
from miles_train.megatron import inputs, trainer
from miles_train.megatron.optimizer import ShardedAdamW
from miles_train.megatron.worker import Worker
from miles_train.ranks.messages import READS, Micro
from miles_train.ranks.sharding import Cut

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

BOUND = 1.05


class BareWorker(Worker):
    """A rank that can do both."""

    def prepare(self, micros: list[Micro]) -> None:
        """Build the bare loop's own model and optimizer, and its tensors."""
        from miles_train.megatron import model as models

        model, options = self._model, self.options
        path = options.context.model_path
        assert path is not None
        self._bare = models.build(path, model.spec, options.layout, getattr(torch, options.dtype), replay=False)
        self._bare_optimizer = ShardedAdamW(self._bare, options.config, path)
        made = [inputs.micro_inputs(m.batch, options.layout, model.coordinates.context, self.device) for m in micros]
        self._prepared = [(micro, *_targets(micro)) for micro in made]

    def bare(self, cross_entropy: bool) -> float:
        """One optimizer step; its loss."""
        optimizer, model = self._bare_optimizer, self._bare
        losses = []

        def loss(hidden: torch.Tensor, micro: Any, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            if not cross_entropy:
                rows = np.flatnonzero(micro.batch.array("loss_mask"))
                return -inputs.outputs(model, hidden, micro, rows)["logprobs"].sum() / micro.batch.segments.tokens
            tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
            model.output_layer.sequence_parallel = False  # the hidden states are whole already
            logits, _ = model.output_layer(hidden[:, None], weight=tied)
            return (vocab_parallel_cross_entropy(logits.float(), targets)[:, 0] * mask).sum() / micro.batch.segments.tokens

        def forward_step(iterator: Any, module: Any) -> tuple[torch.Tensor, Callable]:
            micro, targets, mask = next(iterator)

            def loss_function(hidden: torch.Tensor) -> tuple:
                value = loss(hidden, micro, targets, mask)
                losses.append(value.detach())
                return value, torch.zeros((), dtype=torch.int), {}

            return module(micro.tokens, micro.positions, micro.mask), loss_function

        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(self._prepared),
            model=[optimizer.module],
            num_microbatches=len(self._prepared),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer._optimizer.step()  # megatron's own: norm, clip, AdamW
        return float(sum(losses))


def _targets(micro: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, 1] target ids and [R] trained rows as floats; 0 in padding."""
    rows, real = micro.tokens.shape[1], micro.batch.n_rows
    targets, mask = torch.zeros((rows, 1), dtype=torch.int64), torch.zeros(rows)
    targets[:real, 0] = torch.from_numpy(micro.batch.array("targets").astype(np.int64))
    mask[:real] = torch.from_numpy(micro.batch.array("loss_mask").astype(np.float32))
    return targets, mask


def write_model(directory: Path, args: argparse.Namespace) -> Path:
    """A random Qwen3, or Qwen3-MoE with 8 experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=args.width) if args.model == "moe" else {}
    config = AutoConfig.for_model(
        "qwen3_moe" if experts else "qwen3",
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=args.width // 8,
        tie_word_embeddings=False,
        **experts,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def batch_of(args: argparse.Namespace) -> Batch:
    """Samples of random tokens and lengths; all but the first token of each are trained."""
    rng = np.random.default_rng(0)
    refs = []
    for i, n in enumerate(rng.integers(args.longest // 4, args.longest + 1, args.samples).tolist()):
        sampled = np.arange(n) > 0
        logprobs = np.where(sampled, -np.log(args.vocab), np.nan)
        sample = Sample.of(
            SampleId("bench", "policy", f"p{i}", f"g{i}", 0, 0),
            rng.integers(0, args.vocab, n),
            versions=sampled - 1,
            loss_mask=sampled,
            logprobs=logprobs,
            spans=[SamplingSpan(1, n, 1.0)],
        )
        refs.append(SampleRef.of(sample))
    batch = Batch.of(refs)
    return batch.with_columns({"advantages": np.ones(batch.n_rows, np.float32)})


async def asked(ours: Any, method: str, arguments: list[tuple], what: str) -> list[Any]:
    """A call of the trainer's ranks, with a deadline of its own."""
    ours._within_deadline()
    return await ours._call(method, arguments, what)


def build(path: Path, run_dir: Path, cluster: Any, args: argparse.Namespace, layout: dict[str, int]) -> Any:
    """The trainer as a run builds it."""
    from miles_core.assembly import build_trainer

    gates = {"mismatch": float("inf"), "ess": 0.0}
    options = {
        "use": "megatron",
        "parallel": layout,
        "gates": gates,
        "routing_replay": False,
        "micro_batch_tokens": args.micro_batch_tokens,
    }
    policy = {"path": str(path), "losses": {"nll": {"use": "nll"}}, "advantage": "grpo", "engine": "local", "trainer": options}
    stage = {
        "steps": 1,
        "groups": 1,
        "data": {"use": "texts", "texts": ["-"]},
        "rollout": {"use": "trajectories", "sampling": {"max_tokens": 1}},
    }
    config = RunConfig.from_mapping({"name": "bench", "trackers": {}, "stages": {"main": stage | {"models": {"policy": policy}}}})
    main_stage = config.stages["main"]
    context = BuildContext(run_dir, "bench", 0, "policy", path, total_steps=1, stage=main_stage, stage_name="main", cluster=cluster)
    return build_trainer(main_stage.models["policy"], context)


async def measure(args: argparse.Namespace, directory: Path) -> dict[str, list[float]]:
    """Seconds of each variant, taking turns."""
    cluster = ProcessesConfig(use="processes", threads=args.threads).build(BuildContext(directory, "bench", 0))
    layout = {k: int(v) for k, v in (part.split("=") for part in args.layout.split(",") if part)}
    trainer.MegatronTrainer.worker = "megatron_step:BareWorker"
    ours = build(write_model(directory / "model", args), directory, cluster, args, layout)
    batch = batch_of(args).load(READS)
    try:
        await ours.start()
        cut = Cut.of(batch, ours.layout, np.arange(len(batch)), args.micro_batch_tokens)
        await asked(ours, "prepare", cut.for_ranks(tuple(batch.columns), ()), "the bare loop")
        loop = asyncio.get_running_loop()

        def timed(step: Callable[[], Any]) -> Callable[[], float]:
            def run() -> float:
                start = time.perf_counter()
                asyncio.run_coroutine_threadsafe(step(), loop).result()
                return time.perf_counter() - start

            return run

        def bare(cross_entropy: bool) -> Callable[[], Any]:
            return lambda: asked(ours, "bare", [(cross_entropy,)] * ours.layout.world_size, "a bare step")

        expected = (await ours.step(batch)).metrics["loss"]
        reporting = [
            r
            for r in range(ours.layout.world_size)
            if (at := ours.layout.coordinates(r)).tensor == 0 and at.pipeline == ours.layout.pipeline - 1
        ]
        for cross_entropy in (False, True):  # they are the same computation, or there is nothing to compare
            losses = await bare(cross_entropy)()
            assert abs(sum(losses[r] for r in reporting) - expected) < 1e-3 * expected, (losses, expected)

        variants = {"miles": timed(lambda: ours.step(batch)), "bare": timed(bare(False)), "bare_cross_entropy": timed(bare(True))}
        return await asyncio.to_thread(interleave, variants, args.repeats)
    finally:
        await ours.close()
        await cluster.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("dense", "moe"), default="dense")
    parser.add_argument("--layout", default="", help="sizes, e.g. tensor=2 or data=2,expert=2; nothing: one rank")
    for name, default in dict(
        vocab=8192, width=512, layers=8, samples=32, longest=256, micro_batch_tokens=1024, threads=1, repeats=5
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        seconds = asyncio.run(measure(args, Path(directory)))
    result: dict[str, Any] = {"benchmark": "megatron_step", **vars(args), "bound": BOUND}
    result["seconds"] = {name: summary(values) for name, values in seconds.items()}
    for name in ("bare", "bare_cross_entropy"):
        result[f"ratio_to_{name}"] = round(median_ratio(seconds["miles"], seconds[name]), 3)
        times = [summary(seconds[n])["median"] for n in ("miles", name)]
        print(f"ours / {name}: {result[f'ratio_to_{name}']:.3f} ({times[0]:.2f} s / {times[1]:.2f} s)")
    name = f"megatron_step_{args.model}" + "".join(f"_{part.replace('=', '')}" for part in args.layout.split(",") if part)
    path = write_result(name, result, ("torch", "megatron-core", "miles-train"))
    print(f"written to {path.relative_to(ROOT)}")
    return 0 if result["ratio_to_bare"] <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
