"""How long `miles check quickstart` takes, from the shell's point of view, beside a bare `python -c pass`.

    uv run --locked python benchmarks/check_time.py

Target: at most 1.5 s (on a quiet machine; the ratio to the bare interpreter says how quiet it was).
"""

from __future__ import annotations

import subprocess
import sys
import time

from _machine import interleave, median_ratio, summary, write_result


def seconds(*arguments: str) -> float:
    """Wall time of a Python process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=60)
    return time.perf_counter() - began


def main() -> None:
    """Measure in turns and write the result."""
    cases = {
        "bare": lambda: seconds("-c", "pass"),
        "numpy and pydantic": lambda: seconds("-c", "import numpy, pydantic"),
        "check": lambda: seconds("-m", "miles_core.cli", "check", "quickstart"),
    }
    measured = interleave(cases, repeats=9)
    result = {name: summary(values) for name, values in measured.items()}
    result["check / numpy and pydantic"] = {"median": median_ratio(measured["check"], measured["numpy and pydantic"])}
    print(result)
    print(write_result("check_time", {"seconds": result, "target_s": 1.5}, ("miles-core", "pydantic", "typer")))


if __name__ == "__main__":
    main()
