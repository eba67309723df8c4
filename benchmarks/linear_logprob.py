"""Time and memory of linear_logprob beside whole logits, log_softmax and gather under autograd, on the CPU.

    uv run --locked python benchmarks/linear_logprob.py

Two jobs: `no_grad` gives logprobs, `backward` also the gradients of hidden and weight. linear_logprob gives the entropy as well, which the
baseline is spared. Time: both in this process, taking turns. Memory: the highest resident size while each does the job once in a process of
its own, less what was resident before (inputs, torch), so gradients count for both. Ratios are linear_logprob / baseline: below 1 it wins.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from _machine import ROOT, interleave, median_ratio, summary, write_result
from miles_kernels.ops.linear_logprob import linear_logprob
from miles_kernels.ops.linear_logprob.reference import CHUNK_BYTES, CHUNK_ROWS
from miles_kernels.ops.linear_logprob.spec import BENCHMARK_CASE, Case, flops

JOBS = ("no_grad", "backward")


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The baseline: all of the logits in float32, as a model's forward leaves them."""
    return torch.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, targets[:, None]).squeeze(1)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_logprob(hidden, weight, targets).logprob


VARIANTS = {"whole_logits": whole_logits, "linear_logprob": chunked}


def inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.rows, case.width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(case.vocab, case.width, generator=g).mul_(case.width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(case.vocab, (case.rows,), generator=g)


def do(job: str, variant: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> float:
    """Seconds the job takes."""
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    with torch.set_grad_enabled(job == "backward"):
        logprob = VARIANTS[variant](hidden, weight, targets)
    if job == "backward":
        logprob.sum().backward()
    return time.perf_counter() - start


def resident(key: str) -> float:
    """VmRSS (now) or VmHWM (highest so far) of this process in MiB. Not getrusage: its maximum is handed down from parent to child."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak_mib(variant: str, case: Case, dtype: torch.dtype, threads: int) -> dict[str, float]:
    """Run in a process of its own: how much each job adds to what is resident. Tiny jobs before it load what is loaded once."""
    torch.set_num_threads(threads)
    arguments, tiny = inputs(case, dtype), inputs(Case(8, 8, 16), dtype)
    peaks = {}
    for job in JOBS:
        do(job, variant, *tiny)
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far becomes what is resident now
        before = resident("VmRSS")
        do(job, variant, *arguments)
        peaks[job] = resident("VmHWM") - before
    return peaks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("rows", "width", "vocab"):
        parser.add_argument(f"--{name}", type=int, default=getattr(BENCHMARK_CASE, name))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    case, dtype = Case(args.rows, args.width, args.vocab), getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)

    arguments = inputs(case, dtype)
    result: dict[str, object] = {"benchmark": "linear_logprob", **vars(args), "whole_logits_mib": case.rows * case.vocab * 4 / 2**20}
    result["chunk_mib"] = max(CHUNK_BYTES, CHUNK_ROWS * case.vocab * 4) / 2**20
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        peaks = {v: processes.submit(peak_mib, v, case, dtype, args.threads).result() for v in VARIANTS}
    for job in JOBS:
        seconds = interleave({v: partial(do, job, v, *arguments) for v in VARIANTS}, args.repeats)
        mib = {v: peaks[v][job] for v in VARIANTS}
        ours, baseline = "linear_logprob", "whole_logits"
        time_ratio, memory_ratio = median_ratio(seconds[ours], seconds[baseline]), mib[ours] / mib[baseline]
        result[job] = {
            "seconds": {v: summary(values) for v, values in seconds.items()},
            "peak_mib": {v: round(value, 1) for v, value in mib.items()},
            "time_ratio": round(time_ratio, 3),
            "memory_ratio": round(memory_ratio, 3),
            "memory_by_chunk": round(mib[ours] / result["chunk_mib"], 3),
            "gflops_per_second": round(flops(case, job == "backward") / summary(seconds[ours])["median"] / 1e9, 1),
        }
        print(f"{job}: time × {time_ratio:.2f}, memory × {memory_ratio:.2f} ({mib[ours]:.0f} against {mib[baseline]:.0f} MiB)")
    path = write_result("linear_logprob", result, ("torch", "miles-kernels"))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
