"""``data_source: parquet``: the rows of Parquet files, read a row group at a time, so that they may be larger than memory."""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from ..errors import ConfigError, DataError
from ..plugin_finding import did_you_mean
from ..protocols import BuildContext
from . import lacking, local_path
from .order import Blocks
from .rows import RowOptions, RowSource, check_columns

if TYPE_CHECKING:  # the extra miles-core[data]
    import pyarrow


class Parquet(RowOptions):
    """Options of ``data_source: parquet``."""

    point: ClassVar[str] = "data_source"
    target: ClassVar[str] = "miles_core.data.parquet:ParquetSource"

    path: str
    """A file, a directory (all ``*.parquet`` in it and below), or a pattern such as ``data/train-*.parquet``; shards go by their
    names. ``~`` and ``${VARIABLE}`` are expanded."""
    shuffle_window: int = Field(65_536, gt=0)
    """Rows that are shuffled among each other, whole row groups (at least one). At most twice as many are in memory."""

    def missing(self) -> list[str]:
        """The library, the files."""
        return lacking("pyarrow", lambda: _files(self.path, "path"))


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file.

    Attributes:
        path: The file.
        number: Which row group of it, from 0.
        first: Rows of the file before it.
    """

    path: Path
    number: int
    first: int


class ParquetFiles:
    """Rows of Parquet files by index. The row groups used last are kept, at most two windows of rows (or one row group).

    Args:
        files: The shards, in their order.
        base: Directory that names of rows are relative to.
        columns: What is read; the rest of a row stays on disk.
        window: Rows that are shuffled among each other.
        limit: Only the first so many rows.

    Raises:
        DataError: A file is no Parquet, lacks a column, or there are no rows.
    """

    def __init__(self, files: list[Path], base: Path, columns: list[str], window: int, limit: int | None) -> None:
        self._base, self._columns = base, columns
        groups, sizes = [], []
        for path in files:
            described = _described(path)
            check_columns(columns, described.schema.to_arrow_schema().names, str(path))
            first = 0
            for number in range(described.num_row_groups):
                groups.append(RowGroup(path, number, first))
                sizes.append(described.row_group(number).num_rows)
                first += sizes[-1]
        ends = np.minimum(np.cumsum(sizes, dtype=np.int64), limit or np.iinfo(np.int64).max)
        if not len(ends) or ends[-1] == 0:
            raise DataError(f"{files[0] if len(files) == 1 else base} has no rows: {len(files)} Parquet files, nothing in them")
        self._groups, self._ends = groups, ends
        self.blocks: Blocks | None = Blocks(np.diff(ends, prepend=0), window, movable=True)
        self._read: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._budget = 2 * max(window, max(sizes))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def where(self, index: int) -> str:
        """File and row (from 0), for errors."""
        group, offset = self._find(index)
        return f"{self._groups[group].path} row {self._groups[group].first + offset}"

    def name(self, index: int) -> str:
        """File, relative to where the shards are, and row: ``train-00001.parquet:17``."""
        group, offset = self._find(index)
        found = self._groups[group]
        return f"{found.path.relative_to(self._base).as_posix()}:{found.first + offset}"

    def column(self, name: str) -> Iterator[Any]:
        """One column of all rows, a row group at a time."""
        left = len(self)
        for group in self._groups:
            if left == 0:
                break
            for value in self._load(group, [name]).column(0).slice(0, left).to_pylist():
                left -= 1
                yield value

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row. Raises DataError, naming the file, when its row group cannot be read."""
        group, offset = self._find(index)
        if group not in self._read:
            self._read[group] = self._load(self._groups[group], self._columns)
            while len(self._read) > 1 and sum(table.num_rows for table in self._read.values()) > self._budget:
                self._read.popitem(last=False)
        self._read.move_to_end(group)
        return self._read[group].slice(offset, 1).to_pylist()[0]

    def _find(self, index: int) -> tuple[int, int]:
        """Row group of a row and its place there."""
        group = int(np.searchsorted(self._ends, index, "right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _load(self, group: RowGroup, columns: list[str]) -> pyarrow.Table:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(group.path) as file:
                return file.read_row_group(group.number, columns=columns, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"row group {group.number} of {group.path} cannot be read: {error}. Write the file again.") from error


class ParquetSource(RowSource):
    """The prompts of Parquet files."""

    def __init__(self, config: Parquet, context: BuildContext) -> None:
        files, base = _files(config.path, "data_source parquet: path")
        super().__init__(config, context, ParquetFiles(files, base, config.fields(), config.shuffle_window, config.limit))


def _described(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is no Parquet file, or not a whole one: {error}") from error


def _files(text: str, setting: str) -> tuple[list[Path], Path]:
    """Shards by name, and the directory they are in or below. Raises ConfigError when there are none."""
    path = local_path(text, setting)
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            raise ConfigError(f"{setting}: no *.parquet file is in {path} or below; correct the path or put the data there")
        return files, path
    files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
    if not files:
        names = [p.name for p in path.parent.glob("*.parquet")] if path.parent.is_dir() else []
        raise ConfigError(
            f"{setting}: there is no file, directory or match of {path}.{did_you_mean(path.name, names)} "
            "Correct the path or put the data there."
        )
    return files, Path(os.path.commonpath([file.parent for file in files]))
