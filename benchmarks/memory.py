"""Memory of a run over 1,000 steps: the anonymous memory of its process after each step, and how it goes on after a warm-up.

    uv run --locked python benchmarks/memory.py [--steps 1000]

A shrunken quick start: a tiny model from scratch, 2 × 4 trajectories with the calculator a step, trajectories written at every step, a
cut at every 100th, an evaluation at every 50th. One thread. Anonymous: resident memory that is no file's, so that it does not depend on
who else has the same libraries loaded. Flat means: a least-squares line through it after the first fifth rises by less than 2 KiB a
step, 200 MiB in 100,000 steps.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from _machine import ROOT, write_result

BOUND = 2048.0
"""Bytes a step."""


def recipe(directory: Path, steps: int) -> dict[str, Any]:
    """The run."""
    import yaml

    policy = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())["models"]["policy"]
    policy["config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    policy |= {
        "engine": {"use": "local"},
        "advantage": {"use": "grpo"},
        "losses": {"ppo": {"use": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28, "old": "current"}},
    }
    data = {"use": "calculator_problems", "size": 1000000, "seed": 1}
    rollout = {"use": "trajectories", "group_size": 4, "environment": {"use": "calculator"}, "sampling": {"max_tokens": 16}}
    return {
        "name": "memory",
        "seed": 0,
        "device": "cpu",
        "runs_dir": str(directory),
        "models": {"policy": policy},
        "data": data,
        "stages": {
            "rl": {
                "steps": steps,
                "groups": 2,
                "rollout": rollout,
                "evaluators": {"held_out": {"use": "sampled", "data": data | {"size": 4, "split": "held_out"}}},
                "every": {"evaluate": 50, "trajectories": 1, "checkpoint": 100},
            }
        },
    }


def measure(steps: int) -> list[int]:
    """Anonymous memory in bytes after each step of a run in this process."""
    import torch
    import yaml

    from miles_core.config import resolve
    from miles_core.observer import Observer
    from miles_core.runner import Run

    torch.set_num_threads(1)
    process = psutil.Process()
    memory: list[int] = []

    class Watch(Observer):
        def step(self, row: Any) -> None:
            if row.get("seconds") is None:  # an evaluation's row
                return
            now = process.memory_info()
            memory.append(now.rss - now.shared)

    with tempfile.TemporaryDirectory(prefix="miles-memory-") as directory:
        path = Path(directory) / "memory.yaml"
        path.write_text(yaml.safe_dump(recipe(Path(directory), steps)))
        asyncio.run(Run(resolve(str(path), []), Watch()).start())
    return memory


def slope(values: list[int]) -> float:
    """Bytes a step of the least-squares line after the first fifth."""
    later = np.array(values[len(values) // 5 :], np.float64)
    return float(np.polyfit(np.arange(len(later)), later, 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    began = time.perf_counter()
    memory = measure(args.steps)
    seconds = time.perf_counter() - began
    rise = slope(memory)
    print(f"{args.steps} steps in {seconds:.0f} s: {rise / 1024:+.2f} KiB a step")
    every = max(1, args.steps // 100)
    result = {
        "benchmark": "memory",
        "steps": args.steps,
        "seconds": round(seconds, 1),
        "bytes_a_step": round(rise, 1),
        "bound_bytes_a_step": BOUND,
        "every": every,
        "mib": [round(value / 2**20, 2) for value in memory[::every]],
    }
    print(f"written to {write_result('memory', result, ('torch', 'transformers', 'miles-core')).relative_to(ROOT)}")
    return int(rise > BOUND)


if __name__ == "__main__":
    sys.exit(main())
