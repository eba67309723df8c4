"""Which form of an op runs: chosen by device and availability, said once in the log, overridden by an environment variable.

An op is a folder `ops/<op>/`. Its `spec.py` has `BACKENDS`: name → `usable(device)`, best first; the name is that of the module beside it,
imported only when it is chosen. `MILES_KERNEL_<OP>=<name>` overrides the choice, e.g. `MILES_KERNEL_LINEAR_LOGPROB=reference`.
"""

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

log = logging.getLogger(__name__)


def backend(op: str, device: torch.device) -> ModuleType:
    """The module that does `op` on `device`. ValueError if `MILES_KERNEL_<OP>` names a backend that does not exist or cannot run here."""
    return _choose(op, device, os.environ.get(_variable(op)) or None)


def _variable(op: str) -> str:
    return f"MILES_KERNEL_{op.upper()}"


@cache
def _choose(op: str, device: torch.device, override: str | None) -> ModuleType:
    backends = import_module(f"miles_kernels.ops.{op}.spec").BACKENDS
    usable = [name for name, test in backends.items() if test(device)]
    if override is not None and override not in backends:
        raise ValueError(f"{_variable(op)}={override}: {op} has no such backend; it has {', '.join(backends)}.")
    if override is not None and override not in usable:
        raise ValueError(f"{_variable(op)}={override}: this backend cannot run on {device}; here {op} has {', '.join(usable) or 'none'}.")
    if not usable:
        raise ValueError(f"{op} cannot run on {device}: none of its backends ({', '.join(backends)}) can.")
    name = override or usable[0]
    log.info("%s on %s: %s%s", op, device, name, f" (by {_variable(op)})" if override else "")
    return import_module(f"miles_kernels.ops.{op}.{name}")
