"""``data_source: huggingface``: a dataset of the Hugging Face hub, or a directory that the ``datasets`` library can read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import Field

from ..errors import ConfigError, DataError
from ..plugin_finding import did_you_mean
from ..protocols import BuildContext
from . import lacking, local_path
from .rows import RowOptions, Rows, RowSource, check_columns
from .stream import StreamedRows, reading_errors

if TYPE_CHECKING:  # the extra miles-core[data]
    from datasets import Dataset, IterableDataset

SETTING = "data_source huggingface"


class HuggingFace(RowOptions):
    """Options of ``data_source: huggingface``. Those of ``load_dataset`` have their names there."""

    point: ClassVar[str] = "data_source"
    target: ClassVar[str] = "miles_core.data.huggingface:HuggingFaceSource"

    path: str
    """A dataset of the hub (``owner/name``), or a directory: one that ``save_to_disk`` wrote, or files laid out as on the hub. ``~`` and
    ``${VARIABLE}`` are expanded."""
    name: str | None = None
    """Name of the dataset's configuration, where it has several."""
    split: str | None = None
    """Which split, or a slice such as ``train[:1000]`` unless it is streamed. Left out only where ``save_to_disk`` wrote one dataset."""
    revision: str | None = None
    """Branch, tag or commit on the hub. Give a commit, so that a run that is resumed reads the same rows."""
    streaming: bool = False
    """Whether rows are read as they are needed, forwards, instead of downloaded and prepared first."""
    shuffle_window: int = Field(10_000, gt=0)
    """Streaming: rows that are shuffled among each other; twice as many are in memory. The stream itself keeps its order. Otherwise
    all rows of an epoch are shuffled, and this is not used."""

    def missing(self) -> list[str]:
        """The library; the directory, where the path can be no name on the hub. The hub is not asked."""
        return lacking("datasets", lambda: _place(self, "path"))


class DatasetRows:
    """Rows of a dataset that lies on disk, memory-mapped: all are equally near."""

    blocks = None

    def __init__(self, dataset: Dataset, who: str, split: str) -> None:
        self._dataset, self._who, self._split = dataset, who, split
        if len(dataset) == 0:
            raise DataError(f"{who} has no rows")

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, index: int) -> str:
        """Path, split and row (from 0), for errors."""
        return f"{self._who} row {index}"

    def name(self, index: int) -> str:
        """Split and row: ``train:17``."""
        return f"{self._split}:{index}"

    def column(self, name: str) -> Iterator[Any]:
        """One field of all rows."""
        return (row[name] for row in self._dataset.select_columns([name]))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset[index]


class HuggingFaceSource(RowSource):
    """The prompts of a dataset's split."""

    def __init__(self, config: HuggingFace, context: BuildContext) -> None:
        super().__init__(config, context, _rows(config, context))


def _rows(config: HuggingFace, context: BuildContext) -> Rows:
    loaded = _load(config)
    split = config.split or "rows"
    who = f"{config.path} {split}"
    check_columns(config.fields(), loaded.column_names or _columns_read(loaded, who), who)
    selected = loaded.select_columns(config.fields())
    if not config.streaming:
        dataset = cast("Dataset", selected)
        return DatasetRows(dataset.select(range(min(len(dataset), config.limit or len(dataset)))), who, split)
    described = (loaded.info.splits or {}).get(config.split)
    states = context.run_dir / "data" / f"{_reading(config)}.jsonl"
    rows = described.num_examples if described else None
    return StreamedRows(cast("IterableDataset", selected), who, split, config.shuffle_window, rows, config.limit, states)


def _columns_read(loaded: Dataset | IterableDataset, who: str) -> list[str]:
    """A stream of JSON knows its columns only when it has read some. Raises DataError when it cannot be read."""
    try:
        return list(next(iter(loaded), {}))
    except reading_errors() as error:
        raise DataError(f"{who} cannot be read, not even its first row: {error.__cause__ or error}") from error


def _reading(config: HuggingFace) -> str:
    """Names this very way of reading these very files: states of a stream are of no other, and of no other release of datasets."""
    from datasets import __version__

    path = local_path(config.path, f"{SETTING}: path")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    there = [(file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(f"{__version__} {config.model_dump_json()} {there}".encode(), digest_size=8).hexdigest()


def _load(config: HuggingFace) -> Dataset | IterableDataset:
    """The split. Raises ConfigError when it cannot be had."""
    from datasets import load_dataset

    path = _place(config, f"{SETTING}: path")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, config)
    if config.split is None:
        raise ConfigError(f"{SETTING}: split is missing: which rows of {config.path}? For example split: train")
    source = str(path) if path.exists() else config.path
    try:
        return load_dataset(source, config.name, split=config.split, revision=config.revision, streaming=config.streaming)
    except (StopIteration, *reading_errors()) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0] or "a file without rows"  # datasets 5.2: StopIteration
        what = ", ".join(f"{k} {v}" for k in ("name", "split", "revision") if (v := getattr(config, k)) is not None)
        raise ConfigError(
            f"{SETTING}: {config.path} ({what}) cannot be loaded: {reason} "
            "Correct the setting, or for a dataset of the hub check the connection, or give a directory."
        ) from error


def _place(config: HuggingFace, setting: str) -> Path:
    """The path as one of this machine; a name on the hub is a path where nothing is. Raises ConfigError when it can be neither."""
    path = local_path(config.path, setting)
    if not path.exists() and (path.is_absolute() or config.path.startswith(("~", ".")) or config.path.count("/") > 1):
        raise ConfigError(f"{setting}: there is no directory {path}, and it is no name on the hub (owner/name); correct path")
    return path


def _saved(path: Path, config: HuggingFace) -> Dataset | IterableDataset:
    """What ``save_to_disk`` wrote."""
    from datasets import DatasetDict, load_from_disk

    for option in ("name", "revision"):
        if getattr(config, option) is not None:
            raise ConfigError(f"{SETTING}: {path} was written by save_to_disk and has no {option}; leave that out")
    try:
        loaded = load_from_disk(path)
    except (KeyError, *reading_errors()) as error:
        raise ConfigError(f"{SETTING}: {path} was written by save_to_disk but cannot be read: {error}") from error
    if isinstance(loaded, DatasetDict):
        if config.split not in loaded:
            there = [str(split) for split in loaded]
            near = did_you_mean(config.split or "", there)
            raise ConfigError(f"{SETTING}: {path} has no split {config.split!r}.{near} It has: {', '.join(there)}")
        loaded = loaded[config.split]
    elif config.split is not None:
        raise ConfigError(f"{SETTING}: {path} holds one dataset without splits; leave split out")
    return loaded.to_iterable_dataset() if config.streaming else loaded
