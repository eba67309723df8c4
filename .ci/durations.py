"""How long tests took, by file, from pytest's JUnit files; and whether those of SGLang and Megatron keep to their 20 minutes, which is
said and fails nothing: machines differ.

    python .ci/durations.py FILE [FILE …]

A test's time counts what it sets up, so that a server or a cluster of the session counts for the first that asks for it.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

SHOWN = 12
REAL_BACKENDS = (
    "*test_collective_transport",
    "*test_engine_conformance",
    "*test_megatron_*",
    "*test_moe",
    "*test_routing_replay",
    "*test_server_transports",
    "*test_sglang_*",
    "*test_trainer_conformance",
)
"""Modules that test SGLang, Megatron and what they have in common with the engines and trainers of our own."""
LIMIT_S = 20 * 60


def by_module(files: Iterable[Path]) -> Counter[str]:
    """Seconds by dotted module name."""
    seconds: Counter[str] = Counter()
    for file in files:
        for case in ET.parse(file).iter("testcase"):
            parts = case.get("classname", "?").split(".")
            module = ".".join(parts[: 1 + next((i for i, part in enumerate(parts) if part.startswith("test_")), len(parts))])
            seconds[module] += float(case.get("time", 0))
    return seconds


def main(files: list[str]) -> int:
    if not files:
        print("usage: python .ci/durations.py JUNIT_FILE …", file=sys.stderr)
        return 2
    seconds = by_module(Path(file) for file in files)
    print(f"ci: ── {sum(seconds.values()):.0f} s in {len(seconds)} test files; the longest:")
    for module, taken in seconds.most_common(SHOWN):
        print(f"{taken:8.0f} s  {module}")
    real = sum(taken for module, taken in seconds.items() if any(fnmatch(module, pattern) for pattern in REAL_BACKENDS))
    print(f"ci: ── SGLang and Megatron: {real:.0f} s of {LIMIT_S} s{': TOO LONG' if real > LIMIT_S else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
