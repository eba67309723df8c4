"""`miles inspect` on a run of many trajectories: seconds, peak memory, and the size of the page.

    python benchmarks/inspect_run.py [--trajectories 100000] [--keep DIRECTORY]

The run is synthetic: groups of 16, 16 groups a step, 40 to 440 tokens a trajectory, log-probabilities, advantages and
old log-probabilities of every token. Each command runs in a process of its own; memory is its peak resident set.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from miles_core.run_dir import RunDir
from miles_core.sample import Sample, SampleId
from miles_core.sample_io import save_samples

GROUPS, SIZE, VOCABULARY = 16, 16, 30_000


def make_run(parent: Path, trajectories: int) -> RunDir:
    """The synthetic run."""
    run = RunDir.create(parent, "synthetic")
    run.config.write_text("name: synthetic\n")
    rng = np.random.default_rng(0)
    for step in range(1, -(-trajectories // (GROUPS * SIZE)) + 1):
        samples = [_sample(rng, step, group, member) for group in range(GROUPS) for member in range(SIZE)]
        save_samples(run.trajectories / f"step-{step:06d}.safetensors", samples)
    return run


def _sample(rng: np.random.Generator, step: int, group: int, member: int) -> Sample:
    prompt, n = rng.integers(0, VOCABULARY, 24).tolist(), int(rng.integers(16, 417))
    logprobs = -rng.exponential(0.6, n)
    sample = Sample.answer(
        SampleId("synthetic", "policy", f"p{step}-{group}", f"g{step}-{group}", member),
        prompt,
        rng.integers(0, VOCABULARY, n).tolist(),
        logprobs.tolist(),
        version=step - 1,
        prompt=f"What is {rng.integers(1000)} and {rng.integers(1000)}, and why does {step}-{group} ask for it?",
        reward=float(rng.random()),
        rewards={"right": 1.0, "brief": 0.5},
    )
    sample.columns["advantages"] = np.full(len(sample), rng.normal(), np.float32)
    old = np.concatenate([np.full(24, np.nan), logprobs + rng.normal(0, 1e-3, n)])
    return _with(sample, "old_logprobs", old.astype(np.float32))


def _with(sample: Sample, name: str, column: np.ndarray) -> Sample:
    sample.columns[name] = column
    return sample


def measured(*arguments: str) -> dict[str, float | str]:
    """Wall and CPU seconds and peak memory of one command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    peak = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    script = f"import resource, sys; from miles_core.cli import main; main(); {peak}"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": "miles " + " ".join(a if len(a) < 40 else Path(a).name for a in arguments),
        "wall_s": round(time.perf_counter() - began, 2),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2),
        "peak_mib": round(int(done.stderr.split()[-1]) / 1024),
    }


def main() -> None:
    """Make the run, time the commands, print one JSON object a line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--trajectories", type=int, default=100_000)
    options.add_argument("--keep", type=Path)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        parent = chosen.keep or Path(scratch)
        run = RunDir.open(parent / "synthetic") if (parent / "synthetic").is_dir() else make_run(parent, chosen.trajectories)
        path, page = str(run.path), run.path / "page.html"
        for extra in ([], ["--groups"], ["--reward", "0.9..", "--prompt", "17-3 "], ["--step", "3"], ["3:7"], ["--json"]):
            print(json.dumps(measured("inspect", path, *extra)), flush=True)
        for tokens in ("0", "2000000"):
            row = measured("inspect", path, "--html", str(page), "--html-tokens", tokens)
            print(json.dumps(row | {"page_mib": round(page.stat().st_size / 2**20, 1)}), flush=True)


if __name__ == "__main__":
    main()
