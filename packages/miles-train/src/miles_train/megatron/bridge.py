"""megatron-core on a machine without a GPU: its sources are rewritten in memory while they are imported.

megatron-core names its device literally (``device='cuda'``, ``torch.cuda.current_device()``). In the modules of ``REWRITTEN`` such
places become the CPU's, line by line, so that tracebacks still fit the files; files and byte code on disk stay as they are.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from types import CodeType, ModuleType
from typing import Any

import torch

from miles_core.errors import ConfigError

from ..plugins import MEGATRON as VERSION

RULES: tuple[tuple[str, str], ...] = (
    (r"'torch\.cuda\.(Half|BFloat16|Float)Tensor", r"'torch.\1Tensor"),  # what tensor.type() is compared with
    (r"(?<![\"'\w])torch\.cuda\.(?!\w+Tensor\b)", "miles_cpu."),  # calls: to the stand-in below
    (r"(?<=[(=])([\"'])cuda\1", "'cpu'"),  # device='cuda', torch.device('cuda'), init_data('cuda'), autocast('cuda')
    (r"\bpin_memory=True", "pin_memory=False"),
    (r"\.cuda\([^()]*(\([^()]*\))?[^()]*\)", ".cpu()"),
    (r"\b_lazy_call\(cb\)", "cb()"),  # would be put off until CUDA is ready
    (r"(?m)^enable_jit_fuser\(\)", "disable_jit_fuser()"),  # torch.compile wants a C++ compiler and minutes
    (r" and tensor\.is_cuda:", ":"),  # maybe_move_tensor_to_cpu: what it moves may have to become NumPy
)
"""Regular expressions and what takes their place."""

REWRITTEN = {
    "dist_checkpointing.exchange_utils": 7,
    "dist_checkpointing.strategies.async_utils": 5,
    "dist_checkpointing.strategies.filesystem_async": 1,
    "dist_checkpointing.strategies.fully_parallel": 2,
    "dist_checkpointing.strategies.state_dict_saver": 2,
    "distributed.distributed_data_parallel": 8,
    "distributed.param_and_grad_buffer": 7,
    "jit": 1,
    "models.common.embeddings.rope_utils": 2,
    "models.common.embeddings.rotary_pos_embedding": 3,
    "models.common.language_module.language_module": 1,
    "models.gpt.gpt_model": 1,
    "optimizer.clip_grads": 6,
    "optimizer.distrib_optimizer": 11,
    "optimizer.grad_scaler": 6,
    "optimizer.optimizer": 14,
    "parallel_state": 5,
    "pipeline_parallel.p2p_communication": 8,
    "pipeline_parallel.schedules": 4,
    "pipeline_parallel.utils": 13,
    "rerun_state_machine": 9,
    "tensor_parallel.data": 3,
    "tensor_parallel.layers": 14,
    "tensor_parallel.mappings": 5,
    "tensor_parallel.random": 18,
    "tensor_parallel.utils": 2,
    "timers": 3,
    "transformer.attention": 1,
    "transformer.dot_product_attention": 2,
    "transformer.module": 1,
    "transformer.moe.experts": 2,
    "transformer.moe.moe_utils": 3,
    "transformer.moe.router": 6,
    "transformer.moe.shared_experts": 8,
    "transformer.moe.token_dispatcher": 5,
    "transformer.transformer_layer": 2,
    "transformer.utils": 2,
    "utils": 32,
}
"""Module below megatron.core → how many places of its source the rules change."""

QUIET = (
    # packages that are not used here
    r"(?i).*(apex|transformer.?engine|fused|multi.?tensor|TE is not installed)",
    # experts are never cut, so that they have no use for it
    r"`sequence_parallel` is set to `True`, but tensor model parallel size",
    # megatron calls torch's collectives by names that torch is giving up
    r"`torch\.distributed\.\w+` is deprecated",
)
"""Beginnings of warnings that say nothing to a user of Miles."""
CPU_QUIET = (r".*CUDA_DEVICE_MAX_CONNECTIONS",)


def install() -> None:
    """Make ``import megatron.core`` work on this machine; call it before the first one. A second call does nothing.

    Where CUDA is available nothing is rewritten. In both cases megatron's complaints about packages that Miles does not need are silenced.

    Raises:
        ConfigError: megatron-core is missing, of another version than 0.16.1, was imported before, or its sources are not those
            that this module knows.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise ConfigError("trainer: megatron needs megatron-core; install miles-train[megatron]") from error
    if version != VERSION:
        raise ConfigError(f"megatron-core is {version}, but Miles knows the sources of {VERSION}; install megatron-core=={VERSION}")
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    if torch.cuda.is_available():
        return
    if "megatron.core" in sys.modules:
        raise ConfigError(
            "megatron.core was imported before miles_train.megatron.bridge.install(), so it would look for a GPU that this machine does "
            "not have; import miles_train.megatron.model first"
        )
    for message in CPU_QUIET:
        warnings.filterwarnings("ignore", message=message, module=r"megatron\.core")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found", while megatron is imported
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are rewritten; all others are found as ever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        name = fullname.removeprefix("megatron.core.")
        if name == fullname or name not in REWRITTEN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return None
        spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the rewritten source; byte code on disk is neither read nor written."""

    def get_code(self, fullname: str) -> CodeType:
        return compile(rewrite(fullname, self.get_data(self.path).decode()), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["miles_cpu"] = miles_cpu
        super().exec_module(module)


def rewrite(module: str, source: str) -> str:
    """The source of a module of ``REWRITTEN`` for a CPU. Raises ConfigError if it is not the source that the table was made for."""
    changed = 0
    for pattern, replacement in RULES:
        source, count = re.subn(pattern, replacement, source)
        changed += count
    if changed != (expected := REWRITTEN[module.removeprefix("megatron.core.")]):
        raise ConfigError(
            f"{module} names CUDA in {changed} places where megatron-core {VERSION} has {expected}: the installed package was modified. "
            f"Install it again: uv pip install --reinstall megatron-core=={VERSION}"
        )
    return source


class _Stream:
    """A stream, an event and a generator-less device in one: everything happens at once and in order. All are equal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: _Stream) -> None: ...

    def wait_event(self, event: _Stream) -> None: ...

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return self

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...


class _Generators:
    """``default_generators`` of a machine with one device, whatever its index is called."""

    def __init__(self) -> None:
        self.only = torch.Generator()

    def __getitem__(self, index: Any) -> torch.Generator:
        return self.only


class _Cpu:
    """What stands for ``torch.cuda`` in rewritten modules: the parts that training calls.

    Its random numbers are a generator of their own, as those of a GPU are: dropout and initialisation on a CPU draw from torch's.
    """

    Stream = Event = _Stream

    def __init__(self) -> None:
        self.default_generators = _Generators()
        self.random = self
        self.amp = torch.cuda.amp

    def is_available(self) -> bool:
        return False

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def default_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.default_generators.only.get_state()

    def manual_seed(self, seed: int) -> None:
        self.default_generators.only.manual_seed(seed)


miles_cpu = _Cpu()
