"""Memory stays where it is over many steps (issue 5): the benchmark's run, shorter, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BOUND = 24 * 1024
"""Bytes a step. Measured: below 1 KiB, ± 10 KiB by what allocators give back and take again; a run that keeps its batches takes 38 KiB."""


@pytest.mark.slow
def test_a_run_does_not_grow():
    code = "import json, memory; m = memory.measure(600); print(json.dumps([len(m), memory.slope(m)]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
    steps, rise = json.loads(done.stdout.splitlines()[-1])
    assert steps == 600
    assert rise < BOUND
