"""SGLang's own environments: built by uv from a pinned list, one command, used by the server's process alone.

SGLang needs a hundred packages that Miles does not; its servers run under an interpreter of their own. An environment lies in
``$MILES_HOME/engines`` (``~/.cache/miles`` unless the variable is set), in a directory named after its list, so that another
list is another environment. It is complete when its stamp is there, which is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miles_core.errors import ConfigError, RunError
from miles_core.plugin_finding import did_you_mean

from .probe import probe

ENVIRONMENTS = Path(__file__).parent / "environments"
PYTHON = "3.11"
"""Version of the environments' Python: the lists are made for it."""
STAMP = "miles-environment.json"
LOG = "install.log"
BUILD_SECONDS = 3600.0
"""Deadline of a build, and of waiting for somebody else's."""


@dataclass(frozen=True)
class Environment:
    """One environment that can be had, and how far it is."""

    name: str
    directory: Path
    state: Literal["installed", "incomplete", "missing"]

    @property
    def interpreter(self) -> Path:
        """Its Python."""
        return self.directory / "bin" / "python"


def names() -> list[str]:
    """The environments that can be installed."""
    return sorted(path.stem for path in ENVIRONMENTS.glob("*.txt"))


def pins(requirements: Path) -> dict[str, str]:
    """Version by package of a pinned list."""
    lines = [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def home() -> Path:
    """Where environments lie unless a directory is given."""
    return Path(os.environ.get("MILES_HOME") or Path.home() / ".cache" / "miles").expanduser().absolute() / "engines"


def look(name: str, directory: Path | None = None) -> Environment:
    """Where an environment lies (in ``directory``, else in ``home()``) and whether it is complete.

    Raises ConfigError when no environment has this name.
    """
    place = (directory or home()).absolute() / f"{name}-{_digest(name)}"
    if not place.exists():
        return Environment(name, place, "missing")
    complete = _stamp_of(place) == _stamp(name) and (place / "bin" / "python").exists()
    return Environment(name, place, "installed" if complete else "incomplete")


def find(name: str, directory: Path | None = None) -> Path:
    """The interpreter of an installed environment.

    Raises:
        ConfigError: It is not installed, or not completely; says the command that installs it.
    """
    environment = look(name, directory)
    if environment.state == "installed":
        return environment.interpreter
    others = [p.name for p in environment.directory.parent.glob(f"{name}-*") if p.is_dir() and p != environment.directory]
    if environment.state == "incomplete":
        what = f"is not complete in {environment.directory} (an installation was interrupted or is still running, or its Python is gone)"
    elif others:
        what = f"is installed only from another list of packages than this version of Miles has ({', '.join(sorted(others))})"
    else:
        what = "is not installed"
    raise ConfigError(f"SGLang's environment {name!r} {what}. Install it with: miles engine install {name}")


def install(name: str, directory: Path | None = None, report: Callable[[str], None] = print) -> Path:
    """Build an environment unless it is there.

    Args:
        name: One of ``names()``.
        directory: Where environments lie; ``home()`` if None.
        report: Gets a line when a build starts and one when it is done; nothing if there is nothing to do.

    Returns:
        Its interpreter.

    Raises:
        ConfigError: No environment has this name, there is no uv, or uv fails (with uv's own words, and where its output is).
        RunError: Another process holds the lock past the deadline.
    """
    environment = look(name, directory)
    if environment.state == "installed":
        return environment.interpreter
    environment.directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(environment.directory, report):
        if look(name, directory).state != "installed":  # somebody may have built it while we waited
            _build(environment, report)
    return environment.interpreter


def _build(environment: Environment, report: Callable[[str], None]) -> None:
    requirements, place, started = _requirements(environment.name), environment.directory, time.monotonic()
    uv = _uv()
    report(f"Building SGLang's environment {environment.name} in {place}: {len(pins(requirements))} packages, linked from uv's cache")
    if place.exists():
        shutil.rmtree(place)
    _run([*uv, "venv", "--quiet", "--no-project", "--python", PYTHON, str(place)], place)
    _run([*uv, "pip", "install", "--no-deps", "--python", str(environment.interpreter), "-r", str(requirements)], place)
    versions = probe(environment.interpreter)
    (place / STAMP).write_text(json.dumps(_stamp(environment.name), indent=1))
    report(f"Done in {time.monotonic() - started:.0f} s: sglang {versions.sglang}, torch {versions.torch}, Python {versions.python}")


def _run(command: list[str], place: Path) -> None:
    """One command of uv; what it says goes to the environment's log, and into the error."""
    try:
        done = subprocess.run(
            command, cwd=place.parent, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"`{' '.join(command[:4])} …` did not finish within {BUILD_SECONDS:g} s; is the package index reachable?") from error
    said = done.stdout.decode(errors="replace").strip()
    if place.is_dir():
        with open(place / LOG, "a") as log:
            log.write(f"$ {' '.join(command)}\n{said}\n")
    if done.returncode != 0:
        words = " ".join(said[-600:].split()) or "nothing"
        raise ConfigError(f"uv could not build SGLang's environment (exit code {done.returncode}); it said: {words}. Log: {place / LOG}")


def _uv() -> list[str]:
    if path := shutil.which("uv"):
        return [path]
    if importlib.util.find_spec("uv"):
        return [sys.executable, "-m", "uv"]
    raise ConfigError("SGLang's environment is built with uv, and there is none on the PATH; pip install uv")


@contextlib.contextmanager
def _locked(place: Path, report: Callable[[str], None]) -> Generator[None]:
    """Hold the lock file beside an environment."""
    path = place.with_name(f".{place.name}.lock")
    with open(path, "a+") as file:
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = path.read_text().strip() or "unknown"
            if time.monotonic() - started > BUILD_SECONDS:
                raise RunError(
                    f"waited {BUILD_SECONDS:g} s for process {holder}, which is building {place}; end it, or wait longer ({path})"
                )
            if not told:
                report(f"Waiting for process {holder}, which is building {place}")
                told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _requirements(name: str) -> Path:
    path = ENVIRONMENTS / f"{name}.txt"
    if name not in names():
        raise ConfigError(f"there is no environment {name!r} for SGLang.{did_you_mean(name, names())} There are: {', '.join(names())}")
    return path


def _digest(name: str) -> str:
    return hashlib.sha256(json.dumps(_stamp(name), sort_keys=True).encode()).hexdigest()[:10]


def _stamp(name: str) -> dict[str, str | dict[str, str]]:
    return {"environment": name, "python": PYTHON, "packages": pins(_requirements(name))}


def _stamp_of(place: Path) -> dict | None:
    try:
        return json.loads((place / STAMP).read_text())
    except (FileNotFoundError, ValueError):
        return None
