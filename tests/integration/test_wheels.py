"""Each package can be built, and its wheel works alone: only its own dependencies come, core carries the recipes, and what the package's
README shows runs. A package of somebody else's that registers plug-ins is found, used in a run, and named when it is broken.

The names are not on PyPI, so that "alone" means `--find-links dist`. Versions are held to the lock's: what is tested is what the
workspace ships, and torch comes from uv's cache instead of the network.
"""

from __future__ import annotations

import json
import os
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
        run(venv, tmp_path, python, "-I", "-c", code)
        run_readme(name, venv, tmp_path)
    finally:
        shutil.rmtree(venv, ignore_errors=True)  # 5 GB each where the cache cannot be hard-linked


def run(venv: Path, directory: Path, *command: str | Path, code: int = 0) -> str:
    """What a command in a virtual environment prints, to either output. It has to end with this code."""
    environment = {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "HOME": str(directory), "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=directory, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def run_readme(name: str, venv: Path, directory: Path) -> None:
    """The first Python example of a package's README, and its first commands if it shows any."""
    text = (ROOT / "packages" / name / "README.md").read_text()
    blocks = {
        language: block for language, block in reversed(re.findall(r"^```(python|bash)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    }
    (directory / "example.py").write_text(blocks["python"])
    run(venv, directory, venv / "bin" / "python", "example.py")
    if "bash" in blocks:
        run(venv, directory, "bash", "-euc", blocks["bash"])


def build_plugin(directory: Path, *replacements: tuple[str, str]) -> Path:
    """The wheel of the third-party package, with pieces of its pyproject replaced."""
    package = directory / "package"
    shutil.copytree(ROOT / "tests" / "fixtures" / "plugin_package", package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / "pyproject.toml").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (package / "pyproject.toml").write_text(text)
    uv("build", "--quiet", "--wheel", package, "--out-dir", directory / "dist")
    (wheel,) = (directory / "dist").glob("*.whl")
    return wheel


OURS = ("miles-core", "miles-kernels", "miles-rollout", "miles-train", "miles-agents")
MINIATURE = """
extends: quickstart
name: mini
trackers: {}
models: {policy: {config: {hidden_size: 32, intermediate_size: 64, head_dim: 8}}}
stages:
  sft: {steps: 1, groups: 8, models: {policy: {trainer: {warmup_steps: 0}}}}
  rl:
    steps: 2
    groups: 2
    rollout: {group_size: 4, sampling: {max_tokens: 8}, environment: {use: first_digit}}
    rewards: {brief: {use: brevity, limit: 4, weight: 0.5}}
    evaluators: {held_out: null}
"""
SHOW = """
import json
from miles_core.sample_io import load_samples
samples = load_samples("runs/mini/trajectories/step-000003.safetensors")
print(json.dumps([[s.n_sampled, s.reward, s.rewards] for s in samples]))
"""


def test_a_package_of_somebody_else_is_found_used_and_named_when_it_is_broken(dist: Path, tmp_path: Path) -> None:
    export = ("export", "--quiet", "--locked", "--no-default-groups", "--no-hashes", "--no-header", "--no-annotate")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(uv(*export, "--no-emit-workspace", "--all-packages"))
    venv = tmp_path / "venv"
    install = ("pip", "install", "--quiet", "--python", venv / "bin" / "python", "--find-links", dist, "--constraints", constraints)
    (tmp_path / "mini.yaml").write_text(MINIATURE)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for directory in (whole, broken):
        directory.mkdir()
    try:
        uv("venv", "--quiet", "--python", "3.11", venv)
        uv(*install, *(wheel_of(name, dist) for name in OURS), build_plugin(whole))
        found = {p: json.loads(run(venv, tmp_path, "miles", "plugins", p, "--json"))[p] for p in ("reward", "environment")}
        assert found["reward"]["brevity"] == "miles-example-plugin 1.4.0 (miles_example_plugin:brevity)"
        assert found["environment"]["first_digit"] == "miles-example-plugin 1.4.0 (miles_example_plugin:FirstDigit)"

        run(venv, tmp_path, "miles", "run", "mini.yaml")
        (tmp_path / "show.py").write_text(SHOW)
        samples = json.loads(run(venv, tmp_path, "python", "show.py"))
        assert len(samples) == 8
        for sampled, reward, parts in samples:
            assert parts["brief"] == float(sampled <= 4) and parts["environment"] in (0.0, 1.0)
            assert reward == parts["environment"] + 0.5 * parts["brief"]

        version = ('version = "1.4.0"', 'version = "1.5.0"')
        uv(*install, build_plugin(broken, version, ("miles_example_plugin:brevity", "miles_example_plugin:brevty")))
        said = run(venv, tmp_path, "miles", "run", "mini.yaml", code=1)
        assert "reward 'brevity' of miles-example-plugin 1.5.0 (miles_example_plugin:brevty) does not import" in said, said
        assert "Update that package, or uninstall it" in said and "Traceback" not in said, said
        assert not (tmp_path / "runs" / "mini-2").exists()

        uv("pip", "uninstall", "--quiet", "--python", venv / "bin" / "python", "miles-example-plugin")
        said = run(venv, tmp_path, "miles", "run", "mini.yaml", code=1)
        assert "no reward is called 'brevity'" in said or "no environment is called 'first_digit'" in said, said
        assert "Install the package that has it" in said, said
    finally:
        shutil.rmtree(venv, ignore_errors=True)
