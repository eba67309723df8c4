"""Lets SGLang 0.5.23 serve without a GPU. A plug-in of SGLang itself (entry point ``sglang.srt.plugins``), run by each of its processes.

This directory goes on the PYTHONPATH of a SGLang server on a CPU, and of nothing else. What it does, and all it does:

- ``sgl_kernel`` beside this file stands in for the kernel package, which has no CPU wheel on PyPI.
- Page-locked memory is the GPU driver's: ``pin_memory=`` and ``Tensor.pin_memory`` do nothing here.
- The host buffer of the routed experts is registered with the GPU driver: that does nothing either.
- Weights that come by value are decoded by ``pybase64``, as SGLang decodes everything else, not by the ten times slower standard library.
"""

from __future__ import annotations

import functools
import sys
from importlib import metadata
from typing import Any

WRITTEN_FOR = "0.5.23"
FACTORIES = ("tensor", "empty", "zeros", "ones", "full")
"""Functions of torch that SGLang calls with ``pin_memory=True`` without asking whether there is a GPU."""


def activate() -> None:
    """Called by SGLang before it builds anything. Exits the process, with a sentence, under another version than it was written for."""
    found = metadata.version("sglang")
    if found != WRITTEN_FOR:
        sys.exit(
            f"Miles' CPU shim is written for sglang {WRITTEN_FOR}, and this is {found}. Use the environment of "
            "`miles engine install sglang-cpu`, or a GPU, where no shim is needed."
        )
    import pybase64
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.utils import msgspec_utils

    msgspec_utils.base64 = pybase64
    for name in FACTORIES:
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self  # ty: ignore[invalid-assignment]
    HookRegistry.register("sglang.srt.mem_cache.pool_host.common._cuda_host_register", _nothing, HookType.REPLACE)


def _unpinned(factory: Any) -> Any:
    @functools.wraps(factory)
    def without_pinning(*arguments: Any, **options: Any) -> Any:
        options.pop("pin_memory", None)
        return factory(*arguments, **options)

    return without_pinning


def _nothing(*_: Any, **__: Any) -> None:
    return None
