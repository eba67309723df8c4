"""Each package can be built, and its wheel works alone: only its own dependencies come, and core carries the recipes.

The names are not on PyPI, so that "alone" means `--find-links dist`. Versions are held to the lock's: what is tested is what the
workspace ships, and torch comes from uv's cache instead of the network.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from uv import find_uv_bin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(p.name for p in (ROOT / "packages").glob("miles-*"))
WITHOUT_TORCH = {"miles-core", "miles-agents"}


def uv(*args: str | Path) -> str:
    """Standard output of uv; on failure the test shows what uv said."""
    done = subprocess.run([find_uv_bin(), *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, f"uv {' '.join(map(str, args))}\n{done.stderr}"
    return done.stdout


def names_of(requirements: str) -> set[str]:
    """Normalised distribution names of a requirements file, or of `uv pip freeze`."""
    found = re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)", requirements, flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist of every package, and the wheel built from that sdist (uv's default order)."""
    out = tmp_path_factory.mktemp("dist")
    uv("build", "--all-packages", "--out-dir", out)
    return out


def files_in(wheel: Path) -> set[str]:
    return {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}


def wheel_of(name: str, folder: Path) -> Path:
    (wheel,) = folder.glob(f"{name.replace('-', '_')}-*.whl")
    return wheel


@pytest.mark.parametrize("name", NAMES)
def test_wheel_from_sdist_is_the_wheel_of_the_checkout(name: str, dist: Path, tmp_path: Path) -> None:
    uv("build", "--wheel", "--package", name, "--out-dir", tmp_path)
    from_sdist = files_in(wheel_of(name, dist))
    assert from_sdist == files_in(wheel_of(name, tmp_path))
    assert f"{name.replace('-', '_')}/py.typed" in from_sdist


def test_recipes_travel(dist: Path) -> None:
    """Every file of recipes/ is in core's sdist and in the wheel built from it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "recipes"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    recipes = {line for line in listed.stdout.splitlines() if (ROOT / line).is_file()}
    assert "recipes/README.md" in recipes
    wheel = files_in(wheel_of("miles-core", dist))
    assert {n.removeprefix("miles_core/") for n in wheel if n.startswith("miles_core/recipes/")} == recipes
    (sdist,) = dist.glob("miles_core-*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if m.issym() or m.islnk()], "a link in an sdist points at nothing once unpacked"
    assert {"recipes/" + m.name.split("/recipes/", 1)[1] for m in members if "/recipes/" in m.name and m.isfile()} == recipes


@pytest.mark.parametrize("name", NAMES)
def test_installs_alone(name: str, dist: Path, tmp_path: Path) -> None:
    export = ("export", "--quiet", "--locked", "--no-default-groups", "--no-hashes", "--no-header", "--no-annotate")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(uv(*export, "--no-emit-workspace", "--all-packages"))
    expected = names_of(uv(*export, "--package", name, "--no-emit-workspace"))
    ours = (
        {"miles-core", "miles-kernels"} if name in {"miles-rollout", "miles-train"} else {"miles-core"} if name == "miles-agents" else set()
    )

    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    try:
        uv("venv", "--quiet", "--python", "3.11", venv)
        uv("pip", "install", "--quiet", "--python", python, "--find-links", dist, "--constraints", constraints, wheel_of(name, dist))
        installed = names_of(uv("pip", "freeze", "--python", python))
        assert installed <= expected | ours | {name}, f"came along uninvited: {sorted(installed - expected - ours - {name})}"
        assert ours | {name} <= installed
        assert ("torch" in installed) == (name not in WITHOUT_TORCH)
        code = f"import {name.replace('-', '_')} as m; assert {str(venv)!r} in m.__file__, m.__file__"
        if name == "miles-core":
            code += "; from importlib.resources import files; assert (files(m) / 'recipes' / 'README.md').is_file()"
        done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    finally:
        shutil.rmtree(venv, ignore_errors=True)  # 5 GB each where the cache cannot be hard-linked
