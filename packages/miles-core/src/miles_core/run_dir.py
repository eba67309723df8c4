"""A run is a directory anyone can read (DESIGN §7)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError


class RunDir:
    """The files of a run, by name.

    ``config.yaml`` (resolved) · ``metrics.jsonl`` · ``trajectories/`` · ``checkpoints/step-N/`` · ``models/STAGE/NAME/`` (weights
    each stage started from, and ``models/final/``) · ``tensorboard/`` · ``logs/``
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.trajectories = path / "trajectories"
        self.checkpoints = path / "checkpoints"
        self.models = path / "models"
        self.tensorboard = path / "tensorboard"
        self.logs = path / "logs"

    @staticmethod
    def create(parent: Path, name: str) -> RunDir:
        """A new directory ``name``, or ``name-2``, ``name-3`` … if there are earlier runs of that name."""
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                number += 1
                continue
            except OSError as error:
                raise ConfigError(f"the run's directory {path} cannot be made: {error.strerror}. Set runs_dir to another place.") from error
            run = RunDir(path)
            for directory in (run.trajectories, run.checkpoints, run.models, run.logs):
                directory.mkdir()
            return run

    @staticmethod
    def open(path: Path) -> RunDir:
        """An existing run."""
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path} is no run directory: it has no config.yaml. Runs lie in runs/ unless runs_dir says otherwise.")
        return RunDir(path)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of ``metrics.jsonl``, oldest first; an unfinished last line is passed over."""
        if not self.metrics.is_file():
            return
        with self.metrics.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)

    def void_rows_after(self, step: int) -> int:
        """Move metric rows beyond a cut to ``metrics.void.jsonl`` (never deleted); how many there were."""
        kept, void = [], []
        for row in self.rows():
            (kept if row["step"] <= step else void).append(json.dumps(row))
        if void:
            with (self.path / "metrics.void.jsonl").open("a") as file:
                file.writelines(line + "\n" for line in void)
        if self.metrics.is_file():  # written anew in any case: the next row must not go on with an unfinished line
            partial = self.metrics.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            os.replace(partial, self.metrics)
        return len(void)
