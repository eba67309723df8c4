"""What every benchmark says about itself: the machine, the versions, the commit; and the one way in which two things are compared."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _output(*command: str) -> str | None:
    """Standard output of a command, or None where there is no such command or it fails."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, accelerators and system."""
    cpu = platform.processor() or platform.machine()
    try:
        models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0] if models else cpu
    except OSError:
        pass
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus.splitlines() if gpus else [],
        "system": platform.platform(),
    }


def versions(*distributions: str) -> dict[str, str | None]:
    """Python's version and that of each distribution; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether the checkout differed from it."""
    return {"hash": _output("git", "rev-parse", "HEAD"), "dirty": bool(_output("git", "status", "--porcelain"))}


def interleave(cases: dict[str, Callable[[], float]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Measure each case `repeats` times, taking turns, the order reversed every other round.

    What is compared is then measured in the same minute and in the same state of the machine: drift (clocks, caches, neighbours)
    falls on all cases alike. A case returns its own measurement; warm-up rounds are thrown away.
    """
    measured: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(-warmup, repeats):
        for name in list(cases) if i % 2 == 0 else list(cases)[::-1]:
            value = cases[name]()
            if i >= 0:
                measured[name].append(value)
    return measured


def summary(values: list[float]) -> dict[str, float]:
    """Median and the spread around it."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over rounds of the ratio within a round: pairs that were measured side by side."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def write_result(name: str, result: dict[str, Any], distributions: tuple[str, ...] = ()) -> Path:
    """Write benchmarks/results/NAME.json with the facts above beside the result."""
    facts = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "machine": machine()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**result, **facts, "versions": versions(*distributions)}, indent=2) + "\n", encoding="utf-8")
    return path
