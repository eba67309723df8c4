"""How long `import miles_core` takes beside what it cannot do without: numpy and pydantic.

    uv run --locked python benchmarks/import_time.py

Each import runs in a new interpreter that times the import statement alone, so that the interpreter's own start, equal on both sides,
does not flatter the ratio. Files are warm in the page cache (one warm-up round). Target: a median ratio of at most 1.3.
"""

from __future__ import annotations

import subprocess
import sys

from _machine import ROOT, interleave, median_ratio, summary, write_result

TARGET = 1.3
REPEATS = 15


def seconds_to_import(modules: str) -> float:
    """Seconds that `import MODULES` takes in a new interpreter."""
    code = f"from time import perf_counter as t; s = t(); import {modules}; print(t() - s)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def loaded_by_core() -> list[str]:
    """Which of numpy and pydantic `import miles_core` loads at all: where it is lazy, a low ratio says less, and the result shows it."""
    code = "import sys, miles_core; print(*[m for m in ('numpy', 'pydantic') if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def main() -> int:
    loaded = loaded_by_core()
    cases = {name: (lambda name=name: seconds_to_import(name)) for name in ("miles_core", "numpy, pydantic")}
    measured = interleave(cases, REPEATS)
    ratio = median_ratio(measured["miles_core"], measured["numpy, pydantic"])
    result = {
        "benchmark": "import_time",
        "seconds": {name: summary(values) for name, values in measured.items()},
        "median_ratio": round(ratio, 4),
        "target": TARGET,
        "within_target": ratio <= TARGET,
        "loaded_by_miles_core": loaded,
    }
    path = write_result("import_time", result, ("miles-core", "numpy", "pydantic", "safetensors"))
    print(
        f"import miles_core (which loads {', '.join(loaded) or 'neither'}) takes {ratio:.2f} × import numpy, pydantic (target ≤ {TARGET})"
    )
    print(f"written to {path.relative_to(ROOT)}")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
