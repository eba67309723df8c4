"""What `numerics: bitwise` costs: the quick start's GRPO stage in both modes, taking turns.

    uv run --locked python benchmarks/numerics.py [--steps 12] [--rounds 3]

From the quick start's policy after its SFT, one thread. Compared are medians over a run's steps but the first two: a whole step, its
rollout and its training. The largest |Δ logprob| between engine and trainer of any trained token stands beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from _machine import ROOT, summary, write_result
from against_trl import checkpoint

PARTS = {"step": "seconds", "rollout": "time/rollout", "train": "time/train"}


def run(directory: Path, model: Path, mode: str, steps: int, number: int) -> dict[str, float]:
    """Medians of one run."""
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    del recipe["stages"]["sft"]
    recipe["models"]["policy"] = {"path": str(model), "trainer": recipe["models"]["policy"]["trainer"]}
    recipe["stages"]["rl"] |= {"steps": steps, "evaluators": {}, "every": {"checkpoint": 0, "trajectories": 0}}
    name = f"{mode}-{number}"
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"name": name, "numerics": mode, "runs_dir": str(directory), "trackers": {}}))
    subprocess.run(
        [sys.executable, "-m", "miles_core.cli", "run", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    rows = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "time/train" in row]
    medians = {part: statistics.median(row[key] for row in rows[2:]) for part, key in PARTS.items()}
    return medians | {"max_abs": max(row["mismatch/max_abs"] for row in rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"default": [], "bitwise": []}
    with tempfile.TemporaryDirectory() as directory:
        model = checkpoint(Path(directory))
        for number in range(args.rounds):
            for mode, done in runs.items():
                done.append(run(Path(directory), model, mode, args.steps, number))
    result: dict[str, Any] = {"benchmark": "numerics", "runs": runs, "ratios": {}}
    for part in PARTS:
        ratios = [b[part] / d[part] for b, d in zip(runs["bitwise"], runs["default"], strict=True)]
        result["ratios"][part] = summary(ratios)
        print(f"{part}: bitwise takes {statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})")
    for mode, done in runs.items():
        print(f"{mode}: largest |Δ logprob| {max(r['max_abs'] for r in done):.2g}")
    path = write_result("numerics", result, ("torch", "transformers", "miles-core", "miles-kernels", "miles-rollout", "miles-train"))
    print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
