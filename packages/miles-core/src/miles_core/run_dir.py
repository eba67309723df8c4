"""A run is a directory anyone can read (DESIGN §7)."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from . import disk
from .errors import ConfigError, DataError, RunError

FORMAT = 1
"""Of a run's directory; counted up when an older Miles could no longer go on with what a newer one left, or the other way round."""

_in_use: set[Path] = set()
"""Run directories that this process writes to: the lock of a file is a process's, not a thread's."""


class RunDir:
    """The files of a run, by name.

    ``config.yaml`` (resolved) · ``run.json`` (format, version of Miles) · ``run.lock`` (who writes) · ``metrics.jsonl`` ·
    ``trajectories/`` · ``checkpoints/step-N/`` · ``models/STAGE/NAME/`` (weights each stage started from, and ``models/final/``) ·
    ``tensorboard/`` · ``logs/`` · ``void/N/`` (metrics and trajectories of steps that resume number N did again)
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.facts = path / "run.json"
        self.lock = path / "run.lock"
        self.metrics = path / "metrics.jsonl"
        self.trajectories = path / "trajectories"
        self.checkpoints = path / "checkpoints"
        self.models = path / "models"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"
        self.void = path / "void"

    @staticmethod
    def create(parent: Path, name: str) -> RunDir:
        """A new directory ``name``, or ``name-2``, ``name-3`` … if there are earlier runs of that name."""
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
                run = RunDir(path)
                for directory in (run.trajectories, run.checkpoints, run.models, run.logs):
                    directory.mkdir()
                disk.write_whole(run.facts, json.dumps({"format": FORMAT, "miles": metadata.version("miles-core")}) + "\n")
                return run
            except FileExistsError:
                number += 1
            except OSError as error:
                raise ConfigError(f"the run's directory {path} cannot be made: {error.strerror}. Set runs_dir to another place.") from error

    @staticmethod
    def open(path: Path) -> RunDir:
        """An existing run. Raises ConfigError where there is none, or one that another version of Miles has to read."""
        run = RunDir(path)
        if not run.config.is_file():
            raise ConfigError(f"{path} is no run directory: it has no config.yaml. Runs lie in runs/ unless runs_dir says otherwise.")
        if run.facts.is_file():
            run.check_format()
        return run

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``, whole or not at all: without it nothing else of the run could be gone on with."""
        disk.write_whole(self.config, text)

    def check_format(self) -> None:
        """Raise ConfigError unless this version of Miles can go on with the run."""
        ours = f"Miles {metadata.version('miles-core')} goes on with format {FORMAT}"
        try:
            facts = json.loads(self.facts.read_text())
            form, version = facts["format"], facts["miles"]
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path} has no {self.facts.name}: an earlier version of Miles made it. {ours}; start a new run."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.facts} cannot be read ({type(error).__name__}: {error}); expected format and version. {ours}."
            ) from error
        if form != FORMAT:
            raise ConfigError(f"{self.path} has format {form}, made by Miles {version}; {ours}. Use Miles {version} for this run.")

    @contextmanager
    def writing(self) -> Generator[None]:
        """Be the only one who writes to the run; the system lets go when this process ends, however it ends.

        Raises:
            RunError: Another one does.
        """
        key = self.path.resolve()
        if key in _in_use:
            raise RunError(f"{self.path} is in use by this very process. Wait for its run to end.")
        with self._opened_lock() as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                who = file.read().strip() or "another process"
                raise RunError(f"{self.path} is in use: {who} writes to it. Wait for it to end, or stop it.") from None
            except OSError as error:
                raise RunError(f"{self.lock} cannot be locked: {error.strerror}. Put the run on a file system that keeps locks.") from error
            _in_use.add(key)
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
                yield
            finally:
                _in_use.discard(key)

    def _opened_lock(self) -> TextIO:
        try:
            return self.lock.open("a+")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written to: {error.strerror}, opening {self.lock.name}. See to that.") from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of ``metrics.jsonl``, oldest first; an unfinished last line is passed over. Raises DataError for one that is no row."""
        if not self.metrics.is_file():
            return
        with self.metrics.open() as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n"):
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise DataError(
                            f"{self.metrics}:{number} is damaged ({error}); expected a JSON object. Take the line out."
                        ) from error

    def clear_unfinished(self) -> None:
        """Remove what an earlier life was writing when it was killed; cuts see to themselves."""
        for file in [*self.trajectories.glob(".tmp*"), *self.trajectories.glob("*.partial"), *self.path.glob("*.partial")]:
            file.unlink()
        for directory in self.models.glob("*/.*"):  # beside the model that was being built
            shutil.rmtree(directory)

    def make_void(self, done: Mapping[str, int], version: int) -> int:
        """Put what lies beyond a cut aside, never deleted: metric rows and trajectories, into ``void/N/``.

        Args:
            done: By stage, the steps that are not done again. Stages that are not named, or with 0 steps, begin anew.
            version: Steps of the run that are not done again.

        Returns:
            The last step of the run whose row became void; ``version`` if none did.
        """
        kept, void = [], []
        for row in self.rows():
            (kept if 0 <= row["stage_step"] <= (done.get(row["stage"]) or -1) else void).append(row)
        numbered = ((p, re.fullmatch(r".+-(\d+)", p.stem)) for p in self.trajectories.glob("*.safetensors"))
        later = [p for p, number in numbered if number and int(number[1]) > version]
        if void or later:
            aside = self.void / str(1 + max((int(p.name) for p in self.void.glob("*") if p.name.isdecimal()), default=0))
            (aside / "trajectories").mkdir(parents=True)
            disk.write_whole(aside / self.metrics.name, _lines(void))
            for path in later:
                path.rename(aside / "trajectories" / path.name)
        if self.metrics.is_file():  # written anew in any case: the next row must not go on with an unfinished line
            disk.write_whole(self.metrics, _lines(kept))
        return max((row["step"] for row in void), default=version)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
