"""The quick start on several seeds: wall time, unique memory (USS) over its processes, held-out accuracy before and after.

    uv run --locked python benchmarks/quickstart.py [--seeds 5] [key=value …]

Targets: at most 90 s on two quiet cores, at most 600 MB USS, from at most .45 to at least .90 on at least 4 of 5 seeds. Where the
environment forbids Python to keep bytecode, each start would compile torch anew (10 s); here it is kept, as it is for users.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import psutil

from _machine import write_result


def run_once(seed: int, overrides: list[str]) -> dict[str, float | int | bool]:
    """One quick start in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="miles-quickstart-") as directory:
        command = [sys.executable, "-m", "miles_core.cli", "run", "quickstart", f"seed={seed}", f"runs_dir={directory}", *overrides]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""})
        peak = 0
        while process.poll() is None:
            peak = max(peak, unique_bytes(process.pid))
            time.sleep(0.5)
        seconds = time.monotonic() - began
        if process.returncode != 0:
            raise SystemExit(f"seed {seed} ended with exit code {process.returncode}")
        rows = [json.loads(line) for line in (Path(directory) / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["eval/held_out/avg@1"] for row in rows if "eval/held_out/avg@1" in row]
    mismatch = [row["mismatch/mean_abs"] for row in rows if "mismatch/mean_abs" in row]
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "uss_mb": round(peak / 1e6),
        "before": accuracy[0],
        "after": accuracy[-1],
        "learned": accuracy[0] <= 0.45 and accuracy[-1] >= 0.90,
        "mismatch_mean_abs": max(mismatch),
    }


def unique_bytes(pid: int) -> int:
    """USS of a process and its children; 0 once it is gone."""
    try:
        parent = psutil.Process(pid)
        return sum(p.memory_full_info().uss for p in [parent, *parent.children(recursive=True)])
    except psutil.Error:
        return 0


def main() -> None:
    """Run the seeds one after another and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        runs.append(run_once(seed, arguments.overrides))
        print(json.dumps(runs[-1]), flush=True)
    packages = ("miles-core", "torch", "transformers", "numpy")
    name = "quickstart_cpu_torch" if metadata.version("torch").endswith("+cpu") else "quickstart"  # see .ci/cpu-torch
    print(write_result(name, {"overrides": arguments.overrides, "runs": runs}, packages))


if __name__ == "__main__":
    main()
