"""``data_source: jsonl``: one prompt a line of a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import ConfigError, DataError
from ..plugin_finding import did_you_mean
from ..protocols import BuildContext
from . import lacking, local_path
from .rows import RowOptions, RowSource


class Jsonl(RowOptions):
    """Options of ``data_source: jsonl``."""

    point: ClassVar[str] = "data_source"
    target: ClassVar[str] = "miles_core.data.jsonl:JsonlSource"

    path: str
    """The file; ``~`` and ``${VARIABLE}`` are expanded."""

    def missing(self) -> list[str]:
        """The file."""
        return lacking(None, lambda: existing_file(local_path(self.path, "path"), "path"))


def existing_file(path: Path, setting: str) -> Path:
    """The path. Raises ConfigError, beginning with ``setting``, when no file is there."""
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise ConfigError(f"{setting}: there is no file {path}.{did_you_mean(path.name, names)} Correct the path or put the data there.")
    return path


class JsonlFile:
    """Rows of a JSON Lines file by index. Only where each line begins is kept in memory; blank lines are skipped.

    Raises ConfigError when there is no such file, DataError when it is empty.
    """

    blocks = None

    def __init__(self, path: Path, setting: str, limit: int | None = None):
        self.path = existing_file(path, setting)
        self._lines, self._offsets = np.fromiter(chain.from_iterable(islice(_lines(path), limit)), np.int64).reshape(-1, 2).T
        if not len(self):
            raise DataError(f"{path} is empty; a jsonl file holds one JSON object a line")

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        """``file:line`` of a row, for errors."""
        return f"{self.path}:{self._lines[index]}"

    def name(self, index: int) -> str:
        """File name and line of a row: ``rows.jsonl:17``."""
        return f"{self.path.name}:{self._lines[index]}"

    def column(self, name: str) -> Iterator[Any]:
        """One field of all rows; None where it is missing."""
        return (self[index].get(name) for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row. Raises DataError, naming file and line, when it is no JSON object."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.where(index)} is not JSON ({error}): {line[:60]!r}") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.where(index)} holds a {type(row).__name__}; expected a JSON object with fields")
        return row


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """(line number from 1, byte offset) of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, offset
            offset += len(line)


class JsonlSource(RowSource):
    """The prompts of a file, read when they are asked for."""

    def __init__(self, config: Jsonl, context: BuildContext):
        setting = "data_source jsonl: path"
        super().__init__(config, context, JsonlFile(local_path(config.path, setting), setting, config.limit))
