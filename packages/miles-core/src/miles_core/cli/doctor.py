"""``miles doctor``: what this machine and installation can do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from ..errors import MilesError
from ..plugin_finding import EXTRAS, find_all
from ..plugins import POINTS, config_class


@dataclass(frozen=True)
class Finding:
    """One line: ok, missing (an option you do not have) or bad (something is broken)."""

    state: Literal["ok", "missing", "bad"]
    what: str
    found: str


def examine() -> list[Finding]:
    """Look at Python, packages, extras, plug-ins, threads, memory, disk and accelerators."""
    supported = (3, 11) <= sys.version_info < (3, 14)
    findings = [Finding("ok" if supported else "bad", "python", f"{platform.python_version()} (3.11 to 3.13 are supported)")]
    for package in ("miles-core", "miles-rollout", "miles-train", "miles-kernels", "miles-agents"):
        findings.append(_package(package))
    for module, extra in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        findings.append(Finding("ok" if there else "missing", module, _version(module) if there else f"pip install '{extra}'"))
    findings += [_plugins(), _machine(), _disk()]
    if importlib.util.find_spec("torch"):
        findings.append(_torch())
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding("ok", name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding("bad" if name == "miles-core" else "missing", name, f"pip install {name}")


def _version(module: str) -> str:
    try:
        return metadata.version("megatron-core" if module == "megatron" else module)
    except metadata.PackageNotFoundError:
        return "installed"


def _plugins() -> Finding:
    broken, count = [], 0
    for point in POINTS:
        for name in find_all(point):
            count += 1
            try:
                config_class(point, name)
            except MilesError as error:
                broken.append(str(error))
    return Finding("bad" if broken else "ok", "plug-ins", "; ".join(broken) or f"{count} load")


def _machine() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding("ok", "machine", f"{len(os.sched_getaffinity(0))} usable cores, {memory:.0f} GiB memory, {platform.platform()}")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    return Finding("ok" if free > 1 else "bad", "disk", f"{free:.0f} GiB free here")


def _torch() -> Finding:
    import torch

    threads = torch.get_num_threads()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    without = f"none; torch {torch.__version__} computes on the CPU with {threads} thread{'s' if threads > 1 else ''}"
    return Finding("ok", "accelerators", ", ".join(devices) or without)
