"""How plug-ins are found and imported: entry points, ``module:attribute``, decorated objects; and what to do when that fails."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from .errors import PluginError

F = TypeVar("F", bound=Callable[..., Any])
_DECORATED: dict[tuple[str, str], Any] = {}


def decorator(point: str) -> Callable[..., Any]:
    """The decorator of a point: ``@miles.reward`` or ``@miles.reward(name="brevity", needs={"values"})``."""

    def decorate(obj: F | None = None, *, name: str | None = None, **declared: Any) -> Any:
        def note(obj: F) -> F:
            obj.__miles__ = declared  # ty: ignore[missing-attribute]
            register(point, name or obj.__name__, obj)  # ty: ignore[missing-attribute]
            return obj

        return note if obj is None else note(obj)

    return decorate


def register(point: str, name: str, obj: Any) -> None:
    """Let ``use: name`` find an object of this process at a point."""
    _DECORATED[point, name] = obj


_importing = 0


def importing() -> bool:
    """Whether a module is being imported for its plug-ins just now: a script must not start a run then."""
    return _importing > 0


def import_module(name: str) -> ModuleType:
    """A module with plug-ins. Whatever its import raises goes on."""
    global _importing
    _importing += 1
    try:
        return importlib.import_module(name)
    finally:
        _importing -= 1


def import_object(path: str) -> Any:
    """What ``module:attribute`` names."""
    module_name, _, attribute = path.partition(":")
    if not attribute:
        raise PluginError(f"{path!r} is not of the form module:attribute")
    module = import_module(module_name)
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        names = [n for n in vars(module) if not n.startswith("_")]
        raise PluginError(f"module {module_name!r} has no {attribute!r}.{did_you_mean(attribute, names)}") from None


def add_import_directories(directories: Iterable[str | Path]) -> None:
    """Let ``module:attribute`` name modules in these directories and in the working directory (after everything installed)."""
    for directory in (*directories, Path.cwd()):
        if str(directory) not in sys.path:
            sys.path.append(str(directory))


def did_you_mean(word: str, known: list[str]) -> str:
    """A sentence with the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


@dataclass(frozen=True)
class Found:
    """A plug-in that can be named in a recipe, and where it comes from."""

    point: str
    name: str
    origin: str
    load: Callable[[], Any]


def find_all(point: str) -> dict[str, Found]:
    """Every plug-in of a point by name: entry points of installed packages, then decorated objects of this process."""
    found = dict(_installed(point, _packages()))
    for (decorated_point, name), obj in _DECORATED.items():
        if decorated_point == point:
            found[name] = Found(point, name, f"decorated in {obj.__module__}", lambda obj=obj: obj)
    return found


@functools.lru_cache(maxsize=256)
def _installed(point: str, packages: tuple[str, ...]) -> dict[str, Found]:
    """The entry points of a point, read once for as long as nothing is installed: each reading opens the files of every package."""
    found: dict[str, Found] = {}
    for entry in metadata.entry_points(group=f"miles.{point}"):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown package"
        origin = f"{package} ({entry.value})"
        if entry.name in found and found[entry.name].origin != origin:
            raise PluginError(f"{point} {entry.name!r} is registered by both {found[entry.name].origin} and {origin}; uninstall one")
        found[entry.name] = Found(point, entry.name, origin, entry.load)
    return found


def _packages() -> tuple[str, ...]:
    """What is installed: the directories that describe packages, in the order of ``sys.path``."""
    entries = [entry or "." for entry in sys.path]
    read = [entry for entry in entries if os.path.isdir(entry) and os.access(entry, os.R_OK)]
    return tuple(info for entry in read for info in _packages_in(entry, os.stat(entry).st_mtime_ns))


@functools.lru_cache(maxsize=256)
def _packages_in(directory: str, changed: int) -> tuple[str, ...]:
    """Those in a directory, listed once for as long as nothing in it comes or goes."""
    names = (name for name in os.listdir(directory) if name.endswith((".dist-info", ".egg-info")))
    return tuple(os.path.join(directory, name) for name in sorted(names))


def origin_of(point: str, use: str) -> str:
    """Where the plug-in that ``use`` names comes from: package and version, or module."""
    if ":" in use:
        return f"module {use.split(':')[0]}"
    found = find_all(point).get(use)
    return found.origin if found else "this process"


def import_advice(error: Exception, fix: str = "") -> str:
    """Why an import failed, and what brings what is missing; ``fix``: what to do where no extra does."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = EXTRAS.get(error.name.split(".")[0])
        if extra:
            return f"{error.name!r} is not installed; it comes with the extra {extra}: pip install '{extra}'"
        return f"module {error.name!r} is not installed{fix or ' (or not beside the recipe)'}"
    return f"{type(error).__name__}: {error}{fix}"


EXTRAS = {
    "torch": "miles-core[torch]",
    "transformers": "miles-core[data]",
    "datasets": "miles-core[data]",
    "pyarrow": "miles-core[data]",
    "math_verify": "miles-core[math]",
    "httpx": "miles-core[rewards]",
    "regex": "miles-core[rewards]",
    "tensorboard": "miles-core[report]",
    "matplotlib": "miles-core[report]",
    "ray": "miles-core[ray]",
    "wandb": "miles-core[wandb]",
    "peft": "miles-train[lora]",
    "sglang": "miles-rollout[sglang]",
    "megatron": "miles-train[megatron]",
}
"""Which extra brings a module; a missing one becomes a sentence that names it."""
