"""Trackers: where metrics go. ``metrics.jsonl`` is always written; TensorBoard and Weights & Biases are plug-ins."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from .plugins import PluginConfig
from .protocols import BuildContext

Row = Mapping[str, float | int | str]


class JsonlTracker:
    """One JSON object a line, written at once, so that a run can be followed and survives a kill."""

    def __init__(self, path: Path):
        self._path = path

    def log(self, step: int, metrics: Row) -> None:
        """Append ``{"step": step, …}``; the first row makes the file."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def close(self) -> None:
        """Nothing is open between rows."""


class TensorBoard(PluginConfig):
    """Scalars for TensorBoard in the run's ``tensorboard/``."""

    point: ClassVar[str] = "tracker"
    target: ClassVar[str] = "miles_core.trackers:TensorBoardTracker"


class TensorBoardTracker:
    """Writes event files without importing torch."""

    def __init__(self, config: TensorBoard, context: BuildContext):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = vars(event_pb2)["Event"]  # made by protobuf at import; type checkers do not see them
        self._summary: Any = vars(summary_pb2)["Summary"]
        self._start: Any = vars(event_pb2)["SessionLog"](status=1)  # START: readers forget what an earlier life wrote of this step on
        self._first = True
        self._writer = EventFileWriter(str(context.run_dir / "tensorboard"))

    def log(self, step: int, metrics: Row) -> None:
        """Numbers become scalars; texts are left out."""
        if self._first:
            self._writer.add_event(self._event(wall_time=time.time(), step=step, session_log=self._start))
            self._first = False
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in metrics.items() if isinstance(v, int | float)]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Wandb(PluginConfig):
    """Weights & Biases."""

    point: ClassVar[str] = "tracker"
    target: ClassVar[str] = "miles_core.trackers:WandbTracker"

    project: str = "miles"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class WandbTracker:
    """Logs to one wandb run, named like the run; files lie in the run directory."""

    def __init__(self, config: Wandb, context: BuildContext):
        import wandb

        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=context.run,
            dir=str(context.run_dir),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, metrics: Row) -> None:
        """One row."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()
