"""SGLang's environment: the pinned list is the lock's, it is built once, and what is wrong with one is said."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from miles_core.errors import ConfigError, RunError
from miles_rollout.cli import app
from miles_rollout.sglang import environment
from miles_rollout.sglang.environment import ENVIRONMENTS, find, install, look, pins
from miles_rollout.sglang.probe import probe

LOCK = Path(__file__).parents[3] / "uv.lock"
PINS = ENVIRONMENTS / "sglang-cpu.txt"
BRANCH = {"python_version": "3.11", "python_full_version": "3.11.0", "platform_machine": "x86_64", "sys_platform": "linux"}

UV = """\
#!{python}
import json, os, sys, time
with open({calls!r}, "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "venv":
    place = sys.argv[-1]
    os.makedirs(place + "/bin")
    with open(place + "/bin/python", "w") as python:
        python.write("#!/bin/sh\\necho '" + json.dumps(dict(python="3.11.0", sglang="0.5.23", torch="2", transformers="5")) + "'\\n")
    os.chmod(place + "/bin/python", 0o755)
elif os.path.exists({fails!r}):
    sys.exit("error: no solution found for your torch")
"""


@pytest.fixture
def uv(tmp_path, monkeypatch):
    """A ``uv`` that notes its calls and makes an interpreter that only says versions; fails to install while ``fails`` exists."""
    folder = tmp_path / "path"
    folder.mkdir()
    program = folder / "uv"
    program.write_text(UV.format(python=sys.executable, calls=str(folder / "calls"), fails=str(folder / "fails")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    (folder / "calls").touch()
    return folder


@pytest.fixture(scope="module")
def locked() -> dict[str, dict]:
    """Each package of uv.lock in the branch for Python 3.11, by name."""
    packages = tomllib.loads(LOCK.read_text())["package"]
    return {p["name"]: p for p in packages if any(applies(m) for m in p.get("resolution-markers", [""]))}


def applies(marker: str) -> bool:
    return not marker or Marker(marker).evaluate(BRANCH)


def test_every_pin_is_the_locks(locked):
    assert {name: locked[canonicalize_name(name)]["version"] for name in pins(PINS)} == pins(PINS)


def test_all_that_torch_needs_is_pinned(locked):
    wanted, seen = [{"name": "torch"}], set()
    while wanted:
        dependency = wanted.pop()
        package = locked[dependency["name"]]
        extras = [d for extra in dependency.get("extra", []) for d in package["optional-dependencies"][extra]]
        new = [] if dependency["name"] in seen else package.get("dependencies", [])
        wanted += [d for d in [*new, *extras] if applies(d.get("marker", ""))]
        seen.add(dependency["name"])
    assert len(seen) > 20 and seen <= set(pins(PINS))


def test_built_once_and_found(uv, tmp_path):
    said: list[str] = []
    interpreter = install("sglang-cpu", tmp_path, said.append)
    calls = (uv / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["venv", "pip"]
    assert "--no-deps" in calls[1] and str(PINS) in calls[1] and str(interpreter) in calls[1]
    assert len(said) == 2 and "0.5.23" in said[1]
    assert look("sglang-cpu", tmp_path).state == "installed"

    assert install("sglang-cpu", tmp_path, said.append) == find("sglang-cpu", tmp_path) == interpreter
    assert (uv / "calls").read_text().splitlines() == calls and len(said) == 2


def test_not_installed_says_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"is not installed\. Install it with: miles engine install sglang-cpu"):
        find("sglang-cpu", tmp_path)


def test_unknown_name_gets_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"no environment 'sglang-gpu'.*Did you mean 'sglang-cpu'"):
        install("sglang-gpu", tmp_path)


def test_failure_of_uv_is_told_and_repaired(uv, tmp_path):
    (uv / "fails").touch()
    with pytest.raises(ConfigError, match=r"exit code 1.*no solution found for your torch.*install\.log"):
        install("sglang-cpu", tmp_path, lambda _: None)
    with pytest.raises(ConfigError, match=r"is not complete.*miles engine install sglang-cpu"):
        find("sglang-cpu", tmp_path)
    (uv / "fails").unlink()
    install("sglang-cpu", tmp_path, lambda _: None)
    find("sglang-cpu", tmp_path)


@pytest.mark.parametrize("harm", ["stamp of another list", "truncated stamp", "Python gone"])
def test_half_an_environment_is_refused_and_rebuilt(uv, tmp_path, harm):
    interpreter = install("sglang-cpu", tmp_path, lambda _: None)
    stamp = interpreter.parents[1] / environment.STAMP
    if harm == "Python gone":
        interpreter.unlink()
        interpreter.symlink_to(tmp_path / "removed" / "python3.11")
    elif harm == "truncated stamp":
        stamp.write_text(stamp.read_text()[:40])
    else:
        content = json.loads(stamp.read_text())
        stamp.write_text(json.dumps(content | {"packages": content["packages"] | {"torch": "1.0"}}))
    with pytest.raises(ConfigError, match="is not complete"):
        find("sglang-cpu", tmp_path)
    assert install("sglang-cpu", tmp_path, lambda _: None) == find("sglang-cpu", tmp_path)
    assert (uv / "calls").read_text().count("venv") == 2


def test_environment_of_an_older_list_is_not_used(uv, tmp_path, monkeypatch):
    old = install("sglang-cpu", tmp_path, lambda _: None)
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / PINS.name).write_text(PINS.read_text().replace("tqdm==", "tqdm==0."))
    monkeypatch.setattr(environment, "ENVIRONMENTS", lists)
    with pytest.raises(ConfigError, match=f"only from another list of packages.*{old.parents[1].name}"):
        find("sglang-cpu", tmp_path)
    assert install("sglang-cpu", tmp_path, lambda _: None) != old


def test_without_uv(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install uv"):
        install("sglang-cpu", tmp_path)


def test_two_at_once_build_once(uv, tmp_path):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(install("sglang-cpu", tmp_path, lambda _: None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert (uv / "calls").read_text().count("venv") == 1


def test_waiting_for_another_has_a_deadline(uv, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "BUILD_SECONDS", 0.3)
    said: list[str] = []
    with environment._locked(look("sglang-cpu", tmp_path).directory, said.append):
        with pytest.raises(RunError, match=rf"waited 0\.3 s for process {os.getpid()}, which is building"):
            install("sglang-cpu", tmp_path, said.append)
    assert said == [f"Waiting for process {os.getpid()}, which is building {look('sglang-cpu', tmp_path).directory}"]


def test_commands(uv, tmp_path, monkeypatch):
    monkeypatch.setenv("MILES_HOME", str(tmp_path / "home"))
    runner = CliRunner()

    def state() -> str:
        return json.loads(runner.invoke(app, ["list", "--json"]).stdout)["sglang-cpu"]["state"]

    assert state() == "missing"
    done = runner.invoke(app, ["install", "sglang-cpu"])
    assert done.exit_code == 0 and re.search(r"is installed: .*/home/engines/sglang-cpu-\w+/bin/python", done.stdout)
    assert state() == "installed"
    assert "sglang-cpu" in runner.invoke(app, ["list"]).stdout
    assert isinstance(runner.invoke(app, ["install", "vllm"]).exception, ConfigError)


def test_the_real_one(sglang_interpreter, locked):
    assert install("sglang-cpu", report=pytest.fail) == sglang_interpreter
    versions = probe(sglang_interpreter)
    assert (versions.sglang, versions.torch, versions.transformers) == tuple(
        locked[name]["version"] for name in ("sglang", "torch", "transformers")
    )
