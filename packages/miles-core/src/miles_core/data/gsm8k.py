"""``data_source: gsm8k``: grade-school word problems whose solutions call a calculator (Cobbe et al. 2021, arXiv:2110.14168).

A row's solution carries annotations: ``48/2 = <<48/2=24>>24 clips``. In a demonstration the policy writes ``<<48/2=`` and the
environment (``gsm8k_calculator``) injects ``24>>``; everything but what is injected is trained. The last line is ``#### 72``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ConfigError, DataError, PluginError
from ..plugins import PluginConfig
from ..protocols import BuildContext, Passage, Prompt
from ..randomness import shuffled
from . import lacking, local_path
from .jsonl import JsonlFile, existing_file
from .rows import text_field

ANNOTATION = re.compile(r"<<(?P<expression>[^<>=\n]+=)(?P<result>[^<>\n]+>>)")
ANSWER = re.compile(r"\n#### (-?[\d,]*\.?\d+)$")


class Subset(BaseModel):
    """Some rows of a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(gt=0)
    seed: int = 0


class Gsm8k(PluginConfig):
    """Options of ``data_source: gsm8k``."""

    point: ClassVar[str] = "data_source"
    target: ClassVar[str] = "miles_core.data.gsm8k:Gsm8kSource"

    path: str = "${MILES_GSM8K}"
    """Directory with ``train.jsonl`` and ``test.jsonl``, or ``hub``: openai/gsm8k from the Hugging Face hub."""
    split: Literal["train", "test"] = "train"
    subset: Subset | None = None
    """A seeded choice of ``size`` rows; all by default."""

    def missing(self) -> list[str]:
        """The library for the hub, which is not asked, or the file."""
        if self.path == "hub":
            return lacking("datasets", lambda: None)
        return lacking(None, lambda: existing_file(_file(self, "path"), "path"))


class Rows(Protocol):
    """Rows by index: a file, or a dataset from the hub."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Gsm8kSource:
    """Question, final answer (label, without thousands separators) and solution (demonstration) of each row."""

    def __init__(self, config: Gsm8k, context: BuildContext):
        self.config = config
        self._rows = _from_hub(config.split) if config.path == "hub" else _from_directory(config)
        if config.subset is not None and config.subset.size > len(self._rows):
            raise ConfigError(f"data_source gsm8k: subset.size is {config.subset.size}, but {config.split} has {len(self._rows)} rows")

    def __len__(self) -> int:
        return self.config.subset.size if self.config.subset else len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row. Raises DataError naming the file and line."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} rows")
        if self.config.subset:
            index = shuffled(index, len(self._rows), "gsm8k", self.config.split, self.config.subset.seed)
        row = self._rows[index]
        where = self._rows.where(index) if isinstance(self._rows, JsonlFile) else f"openai/gsm8k {self.config.split}[{index}]"
        solution = text_field(row, "answer", where)
        return Prompt(
            id=f"gsm8k-{self.config.split}-{index}",
            text=f"Question: {text_field(row, 'question', where)}\nAnswer:\n",
            label=final_answer(solution, where),
            demonstration=tuple(passages(solution, where)),
        )


def final_answer(solution: str, where: str) -> str:
    """The number of the last line, ``#### 1,080`` → ``1080``. Raises DataError naming ``where``."""
    answer = ANSWER.search(solution)
    if answer is None:
        raise DataError(f"{where}: the solution does not end in a line '#### number' but in {solution[-40:]!r}")
    return answer[1].replace(",", "")


def passages(solution: str, where: str) -> Iterator[Passage]:
    """A solution cut where the calculator speaks. Raises DataError naming ``where`` for a ``<<`` or ``>>`` that is no annotation."""
    rest = ANNOTATION.sub("", solution)
    if "<<" in rest or ">>" in rest:
        raise DataError(f"{where}: the solution holds a '<<' or '>>' that is no annotation of the form <<expression=result>>: {solution!r}")
    written = 0
    for annotation in ANNOTATION.finditer(solution):
        yield Passage(solution[written : annotation.start("result")], trained=True)
        yield Passage(annotation["result"], trained=False, role="environment")
        written = annotation.end()
    yield Passage(solution[written:], trained=True)


def _from_directory(config: Gsm8k) -> JsonlFile:
    setting = "data_source gsm8k: path"
    return JsonlFile(_file(config, setting), setting)


def _file(config: Gsm8k, setting: str) -> Path:
    return local_path(config.path, setting) / f"{config.split}.jsonl"


def _from_hub(split: str) -> Rows:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise PluginError("data_source gsm8k with path: hub needs datasets; pip install 'miles-core[data]', or give a directory") from error
    try:
        return load_dataset("openai/gsm8k", "main", split=split)  # ty: ignore[invalid-explicit-return]
    except OSError as error:
        raise ConfigError(
            f"data_source gsm8k: openai/gsm8k cannot be fetched from the Hugging Face hub ({error}). "
            "Check the connection, or set path to a directory with train.jsonl and test.jsonl."
        ) from error
