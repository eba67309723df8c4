"""``data_source: jsonl``: one prompt a line of a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from ..errors import ConfigError, DataError
from ..plugins import PluginConfig, did_you_mean
from ..protocols import BuildContext, Passage, Prompt
from . import local_path


class Jsonl(PluginConfig):
    """Options of ``data_source: jsonl``."""

    point: ClassVar[str] = "data_source"
    target: ClassVar[str] = "miles_core.data.jsonl:JsonlSource"

    path: str
    """The file; ``~`` and ``${VARIABLE}`` are expanded."""
    prompt_field: str = "prompt"
    """Field with the prompt's text."""
    label_field: str | None = None
    """Field that rewards compare with; any JSON value but null."""
    demonstration_field: str | None = None
    """Field with the text that SFT trains on, or the better answer of a pair."""
    rejected_field: str | None = None
    """Field with the worse answer of a pair."""
    id_field: str | None = None
    """Field with a unique id (text or whole number); by default the file's name and the line number."""
    template: str = "{prompt}"
    """What the policy reads: a Python format string over the row's fields; ``{prompt}`` is the prompt field."""
    limit: int | None = Field(None, gt=0)
    """Only the first so many rows."""

    @field_validator("template")
    @classmethod
    def _template_can_be_filled(cls, template: str) -> str:
        if any(name is not None and (name == "" or name[0].isdigit()) for _, name, _, _ in Formatter().parse(template)):
            raise ValueError("a template names its fields: {prompt}, not {} or {0}; a literal brace is doubled")
        return template


class JsonlFile:
    """Rows of a JSON Lines file by index. Only where each line begins is kept in memory; blank lines are skipped.

    Raises ConfigError when there is no such file, DataError when it is empty.
    """

    def __init__(self, path: Path, setting: str, limit: int | None = None):
        if not path.is_file():
            names = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
            raise ConfigError(
                f"{setting}: there is no file {path}.{did_you_mean(path.name, names)} Correct the path or put the data there."
            )
        self.path = path
        self._lines, self._offsets = np.fromiter(chain.from_iterable(islice(_lines(path), limit)), np.int64).reshape(-1, 2).T
        if not len(self):
            raise DataError(f"{path} is empty; a jsonl file holds one JSON object a line")

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        """``file:line`` of a row, for errors."""
        return f"{self.path}:{self._lines[index]}"

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


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A field that must be a text with something in it. Raises DataError naming ``where``, the field and what was found."""
    value = _field(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is a {type(value).__name__}; expected text")
    if not value.strip():
        raise DataError(f"{where}: field {name!r} is empty; fill it or take the row out")
    return value


def _answer(row: dict[str, Any], name: str | None, where: str) -> tuple[Passage, ...]:
    return () if name is None else (Passage(text_field(row, name, where), trained=True),)


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        found = "null" if name in row else f"missing.{did_you_mean(name, list(row))} The row has: {', '.join(row) or 'nothing'}"
        raise DataError(f"{where}: field {name!r} is {found}")
    return row[name]


class JsonlSource:
    """The prompts of a file, read when they are asked for."""

    def __init__(self, config: Jsonl, context: BuildContext):
        self.config = config
        self._file = JsonlFile(local_path(config.path, "data_source jsonl: path"), "data_source jsonl: path", config.limit)
        if config.id_field is not None:
            self._check_ids()

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row. Raises DataError naming file and line."""
        row, where, config = self._file[index], self._file.where(index), self.config
        prompt = text_field(row, config.prompt_field, where)
        try:
            text = config.template.format_map({**row, "prompt": prompt})
        except KeyError as error:
            raise DataError(f"{where}: the template names {error}, which is missing. The row has: {', '.join(row)}") from None
        except (ValueError, AttributeError, LookupError, TypeError) as error:
            raise DataError(f"{where}: the template {config.template!r} cannot be filled: {error}") from None
        return Prompt(
            id=self._id(row, where),
            text=text,
            label=None if config.label_field is None else _field(row, config.label_field, where),
            demonstration=_answer(row, config.demonstration_field, where),
            rejected=_answer(row, config.rejected_field, where),
        )

    def _id(self, row: dict[str, Any], where: str) -> str:
        if self.config.id_field is None:
            return where.removeprefix(f"{self._file.path.parent}/")  # rows.jsonl:17
        value = _field(row, self.config.id_field, where)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(f"{where}: field {self.config.id_field!r} is {value!r}; an id is text or a whole number")
        return str(value)

    def _check_ids(self) -> None:
        """Randomness and ledgers are keyed by the id: two rows with the same one would be taken for one."""
        seen: dict[str, int] = {}
        for index in range(len(self)):
            own = self._id(self._file[index], self._file.where(index))
            if seen.setdefault(own, index) != index:
                raise DataError(f"{self._file.where(index)}: id {own!r} is also that of {self._file.where(seen[own])}; ids must be unique")
