"""One step of `trainer: torch` over two ranks with a thread each, beside one process with two threads; on CPU.

    uv run --locked python benchmarks/torch_ranks.py [--model 30m]

What is timed is the whole call of ``step``: batches go to the ranks and gradients between them. The batches are those of torch_step.py.
All take turns. Seconds are by the clock, which means something only on two cores that have nothing else to do; CPU seconds are of all
processes together: what spreading costs. On two quiet cores half of it is the least that a step can take. Ratios are two ranks / the other.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from _machine import ROOT, interleave, median_ratio, summary, write_result
from miles_core.clusters import ProcessesConfig
from miles_core.protocols import BuildContext
from torch_step import COMMON, MODELS, batch_of, build

PROCESS = "1 process, 2 threads"
RANKS = "2 ranks, 1 thread each"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    for name, default in dict(micro_batch_tokens=2048, repeats=9).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        torch.manual_seed(0)
        path = Path(directory) / "model"
        AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **MODELS[args.model], **COMMON)).save_pretrained(path)
        batch = batch_of(args.model)
        cluster = ProcessesConfig.model_validate({"use": "processes", "threads": 1}).build(BuildContext(Path(directory), "bench", 0))
        here = build(path, micro_batch_tokens=args.micro_batch_tokens)
        ranks = build(path, cluster, micro_batch_tokens=args.micro_batch_tokens, ranks=2)
        try:
            runner.run(ranks.start())
            losses = [runner.run(t.step(batch)).metrics["loss"] for t in (here, ranks)]
            assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0]), losses
            here._worker.submit(torch.set_num_threads, 2).result()  # each thread has a number of its own
            spent: dict[str, list[float]] = {PROCESS: [], RANKS: []}
            cases: dict[str, Callable[[], float]] = {
                PROCESS: lambda: timed(runner, here, batch, spent[PROCESS]),
                RANKS: lambda: timed(runner, ranks, batch, spent[RANKS], pids(Path(directory))),
            }
            seconds = interleave(cases, args.repeats)
        finally:
            runner.run(ranks.close())
            runner.run(cluster.close())
    result: dict[str, Any] = {"benchmark": "torch_ranks", **vars(args), "rows": batch.n_rows, "trained": batch.segments.tokens}
    result["seconds"] = {name: summary(values) for name, values in seconds.items()}
    result["cpu_seconds"] = {name: round(statistics.mean(values[1:]), 4) for name, values in spent.items()}
    result["ratio"] = round(median_ratio(seconds[RANKS], seconds[PROCESS]), 3)
    print(f"{RANKS} / {PROCESS}: {result['ratio']:.3f}")
    for name, values in seconds.items():
        print(f"{name:24} {summary(values)['median']:.4f} s, {result['cpu_seconds'][name]:.4f} CPU-s")
    print(f"written to {write_result(f'torch_ranks_{args.model}', result, ('torch', 'transformers')).relative_to(ROOT)}")
    return 0


def timed(runner: asyncio.Runner, trainer: Any, batch: Any, spent: list[float], others: Sequence[int] = ()) -> float:
    """Seconds of a step; CPU seconds of this process and others are added to ``spent``."""
    start, cpu = time.perf_counter(), time.process_time() + sum(map(cpu_seconds, others))
    runner.run(trainer.step(batch))
    seconds = time.perf_counter() - start
    spent.append(time.process_time() + sum(map(cpu_seconds, others)) - cpu)
    return seconds


def pids(run_dir: Path) -> list[int]:
    """Of the ranks, as their logs say."""
    return [int(log.read_text().split("pid ")[1].split(",")[0]) for log in sorted((run_dir / "logs").glob("*-rank-*.log"))]


def cpu_seconds(pid: int) -> float:
    """What a process has spent, to a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
