"""CI's account of how long tests took."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "durations.py"
TESTS = SCRIPT.parents[1] / "tests"


def report(tmp_path: Path, **seconds: float) -> subprocess.CompletedProcess[str]:
    """Of one JUnit file with two tests a module, one of them in a class; each takes half."""
    cases = [
        f'<testcase classname="tests.differential.{module}{inner}" name="t" time="{taken / 2}" />'
        for module, taken in seconds.items()
        for inner in ("", ".TestIt")
    ]
    (tmp_path / "junit.xml").write_text(f'<testsuites><testsuite name="pytest">{"".join(cases)}</testsuite></testsuites>')
    return subprocess.run([sys.executable, SCRIPT, tmp_path / "junit.xml"], capture_output=True, text=True)


@pytest.mark.parametrize("megatron, end", [(900.0, "1200 s of 1200 s"), (901.0, "1201 s of 1200 s: TOO LONG")])
def test_the_real_backends_have_twenty_minutes(megatron: float, end: str, tmp_path: Path):
    done = report(tmp_path, test_megatron_model=megatron, test_sglang_engine=300.0, test_local_engine=5000.0)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == f"ci: ── SGLang and Megatron: {end}"
    assert lines[0] == f"ci: ── {megatron + 5300:.0f} s in 3 test files; the longest:"
    assert lines[1].split() == ["5000", "s", "tests.differential.test_local_engine"]


def test_every_pattern_names_a_test_file():
    """One that was renamed would be counted no more."""
    patterns = runpy.run_path(str(SCRIPT))["REAL_BACKENDS"]
    assert [p for p in patterns if not list(TESTS.rglob(f"{p}.py"))] == []
