"""Stands in for SGLang's kernel package where there is no GPU: SGLang imports names from it everywhere, and calls none of them there.

Every attribute and every submodule exists; calling one raises NotImplementedError with its name.
"""

from __future__ import annotations

from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from sys import meta_path
from types import ModuleType
from typing import Any


class Absent:
    """A kernel that is not here. Hashable, with nested attributes: SGLang keys tables by ``scalar_types.uint4b8``."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Absent:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Absent(f"{self._name}.{attribute}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{self._name} is a GPU kernel; this SGLang runs on a CPU through Miles' shim and has none")


class Submodules(MetaPathFinder, Loader):
    """Finds every ``sgl_kernel.<anything>`` as a module of absent kernels."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # the usual kind

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = Absent(module.__name__).__getattr__


meta_path.append(Submodules())
__getattr__ = Absent(__name__).__getattr__
