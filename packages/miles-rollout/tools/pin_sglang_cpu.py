"""Writes the versions in ``sglang-cpu.txt`` anew from uv.lock; run it after every change of the lock, in the workspace.

    python packages/miles-rollout/tools/pin_sglang_cpu.py [name ...]

The NAMES in the list are chosen by hand: what a SGLang server on a CPU imports (found by starting it and adding what was
missing) and all that torch needs. Names given here are added. The VERSIONS are the lock's for that Python, so that the
engine's torch and transformers are those of the workspace, and uv links them from its cache instead of fetching them again.
"""

from __future__ import annotations

import subprocess
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from miles_rollout.sglang.environment import ENVIRONMENTS, PYTHON, pins

HEADER = f"""\
# Everything a SGLang server on a CPU imports, for Python {PYTHON}. `miles engine install sglang-cpu` installs it, without dependencies.
# Versions are uv.lock's; written by packages/miles-rollout/tools/pin_sglang_cpu.py, which says where the names come from.
"""
EXPORT = [
    "uv",
    "export",
    "--locked",
    "--package",
    "miles-rollout",
    "--extra",
    "sglang",
    "--no-hashes",
    "--no-emit-workspace",
    "--no-header",
]


def locked() -> dict[str, str]:
    """Version of each package that miles-rollout[sglang] needs, by name, in the branch of the lock for this Python."""
    exported = subprocess.run([*EXPORT, "--no-annotate", "--quiet"], check=True, capture_output=True, text=True).stdout
    requirements = [Requirement(line) for line in exported.splitlines()]
    environment = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.0"}
    chosen = [r for r in requirements if r.marker is None or r.marker.evaluate(environment)]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in chosen}


def main() -> None:
    """Rewrite the list in place."""
    path = ENVIRONMENTS / "sglang-cpu.txt"
    versions = locked()
    names = sorted({*(canonicalize_name(name) for name in pins(path)), *(canonicalize_name(name) for name in sys.argv[1:])})
    unknown = [name for name in names if name not in versions]
    if unknown:
        sys.exit(f"not in uv.lock under miles-rollout[sglang]: {', '.join(unknown)}")
    path.write_text(HEADER + "".join(f"{name}=={versions[name]}\n" for name in names))


if __name__ == "__main__":
    main()
