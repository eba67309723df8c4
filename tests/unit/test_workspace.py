"""The house keeps its shape: the lock is public, arrows between packages are the four that may exist, `import miles_core` stays light."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "packages"
ARROWS = {
    "miles_core": set(),
    "miles_kernels": set(),
    "miles_rollout": {"miles_core", "miles_kernels"},
    "miles_train": {"miles_core", "miles_kernels"},
    "miles_agents": {"miles_core"},
}
NEVER_WITH_CORE = ("torch", "ray", "transformers", "sglang", "megatron", "triton", "datasets", "typer", "rich")


def check_lock() -> ModuleType:
    """.ci/check_lock.py as a module: the test and CI hold the lock to one function."""
    spec = importlib.util.spec_from_file_location("check_lock", ROOT / ".ci" / "check_lock.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lock_is_public() -> None:
    assert check_lock().problems(tomllib.loads((ROOT / "uv.lock").read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        {"registry": "/opt/wheels"},
        {"registry": "../wheels"},
        {"registry": "https://pypi.example.com/simple"},
        {"registry": "http://pypi.org/simple"},
        {"registry": "https://user:secret@pypi.org/simple"},
        {"git": "https://github.com/a/b"},
        {"path": "wheels/a.whl"},
        {"editable": "elsewhere/a"},
    ],
)
def test_lock_guard_sees(source: dict[str, str]) -> None:
    assert check_lock().problems({"package": [{"name": "a", "source": source}]})


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(top-level name, line) of every import: at the top, in functions, under TYPE_CHECKING, and by import_module with a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__", "find_spec"} and isinstance(node.args[0].value, str):
                yield node.args[0].value.split(".")[0], node.lineno


def test_imported_reads_every_form() -> None:
    source = """
import a.b
def f():
    from c.d import e
    from . import own
    importlib.import_module("g.h")
    __import__("i")
"""
    assert {name for name, _ in imported(ast.parse(source))} == {"a", "c", "g", "i"}


@pytest.mark.parametrize("package", ARROWS)
def test_arrows(package: str) -> None:
    source = PACKAGES / package.replace("_", "-") / "src" / package
    forbidden = set(ARROWS) - ARROWS[package] - {package}
    files = sorted(source.rglob("*.py"))
    assert files, f"no source under {source}"
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files
        for name, line in imported(ast.parse(file.read_text(encoding="utf-8"), str(file)))
        if name in forbidden
    ]
    assert not wrong, f"{package} may import only {sorted(ARROWS[package]) or 'itself'}; meet in core's protocols instead:\n" + "\n".join(
        wrong
    )


@pytest.mark.parametrize("package", ARROWS)
def test_declared_dependencies_are_the_arrows(package: str) -> None:
    project = tomllib.loads((PACKAGES / package.replace("_", "-") / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *(d for extra in project.get("optional-dependencies", {}).values() for d in extra)]
    ours = {name for name in ARROWS for d in declared if d.startswith(name.replace("_", "-"))}
    assert ours == ARROWS[package]


def run_python(code: str) -> list[str]:
    """What `code` prints as JSON, in a new interpreter: this one has imported too much already."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_core_is_light() -> None:
    assert run_python(f"import json, sys, miles_core; print(json.dumps([m for m in {NEVER_WITH_CORE!r} if m in sys.modules]))") == []


WALK = """
import importlib, json, pkgutil, sys
import miles_core

HEAVY, MAY = ("torch", "transformers", "ray"), ("miles_core.algorithms", "miles_core.cluster", "miles_core.cli", "miles_core.__main__")
wrong, loaded = [], set()

def walk(package):
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if info.name in MAY:
            continue
        module = importlib.import_module(info.name)
        new = {h for h in HEAVY if h in sys.modules} - loaded
        if new:
            loaded.update(new)
            wrong.append(f"{info.name} loads {sorted(new)}")
        if info.ispkg:
            walk(module)

walk(miles_core)
print(json.dumps(wrong))
"""


def test_core_modules_import_without_torch() -> None:
    """Outside algorithms, cluster and the CLI: `miles check` reads a whole recipe on a machine without torch."""
    assert run_python(WALK) == []


def test_recipes_of_the_checkout_are_the_recipes_of_the_package() -> None:
    link = PACKAGES / "miles-core" / "src" / "miles_core" / "recipes"
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert link.resolve() == ROOT / "recipes"
