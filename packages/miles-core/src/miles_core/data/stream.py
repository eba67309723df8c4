"""Rows of a Hugging Face stream by index: read forwards, a window at a time, from the nearest place that is remembered."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .order import Blocks

if TYPE_CHECKING:  # the extra miles-core[data]
    from datasets import IterableDataset


def reading_errors() -> tuple[type[Exception], ...]:
    """What datasets, and the libraries it reads with, raise when rows cannot be read."""
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError

    return OSError, ValueError, RuntimeError, DatasetsError, HTTPError


class StreamedRows:
    """Rows of a stream. Two windows are in memory: groups in flight straddle their border.

    Args:
        stream: The dataset, with the columns that are read.
        who: What to call it in errors.
        split: What ids of rows begin with.
        window: Rows that are shuffled among each other.
        rows: Rows of the whole stream, if that is known; else they are counted, by reading the stream once.
        limit: Only the first so many rows.
        states: File that remembers the stream's own state at the begin of each window (``state_dict`` of datasets), and how many rows there
            are, so that a run that is resumed reads nothing twice. A run that has lost it only takes longer.

    Raises:
        DataError: The stream is empty or cannot be read.
    """

    def __init__(
        self, stream: IterableDataset, who: str, split: str, window: int, rows: int | None, limit: int | None, states: Path
    ) -> None:
        self._stream, self._who, self._split = stream, who, split
        self._window, self._limit, self._file = window, limit, states
        self._states: dict[int, dict[str, Any]] = {0: stream.state_dict()}
        self._known: int | None = None
        self._read: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._next = 0
        self._remember_from_file()
        rows = rows if rows is not None else self._known if self._known is not None else self._counted()
        self._rows = min(rows, limit or rows)
        if self._rows == 0:
            raise DataError(f"{who} has no rows")
        ends = np.minimum(np.arange(window, self._rows + window, window), self._rows)
        self.blocks: Blocks | None = Blocks(np.diff(ends, prepend=0), window, movable=False)

    def __len__(self) -> int:
        return self._rows

    def where(self, index: int) -> str:
        """Path, split and row (from 0), for errors."""
        return f"{self._who} row {index}"

    def name(self, index: int) -> str:
        """Split and row: ``train:17``."""
        return f"{self._split}:{index}"

    def column(self, name: str) -> Iterator[Any]:
        """One field of all rows, by reading the stream once."""
        return (self[index].get(name) for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row; reads the stream from the nearest known place before it. Raises DataError when the stream ends before the row."""
        window = index // self._window
        if window not in self._read:
            self._read[window] = self._load(window)
            while len(self._read) > 2:
                self._read.popitem(last=False)
        self._read.move_to_end(window)
        rows = self._read[window]
        if index % self._window >= len(rows):
            ended = window * self._window + len(rows)
            raise DataError(
                f"{self._who} ended after {ended} rows, {self._rows} were promised; it was changed, or its description is wrong"
            )
        return rows[index % self._window]

    def _load(self, window: int) -> list[dict[str, Any]]:
        known = max(number for number in self._states if number <= window)
        if self._iterator is None or not known <= self._next <= window:
            self._stream.load_state_dict(self._states[known])
            self._iterator, self._next = iter(self._stream), known
        while True:
            rows = self._forward()
            if self._next > window:
                return rows

    def _forward(self) -> list[dict[str, Any]]:
        """The next window's rows. What fails inside a window leaves no iterator: who asks again begins at a known place."""
        assert self._iterator is not None
        iterator, self._iterator = self._iterator, None
        try:
            rows = list(islice(iterator, self._window))
        except reading_errors() as error:
            about = f"{self._next * self._window} to {(self._next + 1) * self._window}"
            raise DataError(f"{self._who} cannot be read in rows {about}: {error}") from error
        self._iterator = iterator
        self._next += 1
        if self._next not in self._states and len(rows) == self._window:  # nothing begins behind the end
            self._states[self._next] = self._stream.state_dict()
            self._append({"window": self._next, "state": self._states[self._next]})
        return rows

    def _counted(self) -> int:
        self._stream.load_state_dict(self._states[0])
        self._iterator, count = iter(self._stream), 0
        while self._limit is None or count < self._limit:
            rows = len(self._forward())
            count += rows
            if rows < self._window:
                break
        self._iterator, self._next = None, 0
        self._append({"rows": count})
        return count

    def _append(self, fact: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write("\n" + json.dumps(fact))  # a line of its own even after one that a kill tore

    def _remember_from_file(self) -> None:
        if not self._file.is_file():
            return
        for line in self._file.read_text().splitlines():
            try:
                fact = json.loads(line)
            except ValueError:
                continue  # torn
            if "rows" in fact:
                self._known = fact["rows"]
            else:
                self._states[fact["window"]] = fact["state"]
