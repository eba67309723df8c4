"""Hugging Face datasets from disk, whole and streamed: the same rows, resumable from any cut. Nothing here needs the network."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from miles_core.cursor import Cursor
from miles_core.data.huggingface import HuggingFaceSource
from miles_core.data.stream import StreamedRows
from miles_core.errors import ConfigError, DataError, PluginError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext

USE = "miles_core.data.huggingface:HuggingFace"
ROWS = 23


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as save_to_disk writes them (one, and by split), and as files are laid out on the hub (Parquet, JSON)."""
    root = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()
    rows = {"prompt": [f"q{i}" for i in range(ROWS)], "answer": list(range(ROWS)), "unread": ["x"] * ROWS}
    whole = datasets.Dataset.from_dict(rows)
    whole.save_to_disk(root / "one", num_shards=2)
    datasets.DatasetDict(train=whole, test=whole.select(range(5))).save_to_disk(root / "splits")
    (root / "hub" / "data").mkdir(parents=True)
    for number, part in enumerate((range(10), range(10, 11), range(11, ROWS))):
        whole.select(part).to_parquet(root / "hub" / "data" / f"train-{number:05d}-of-00003.parquet")
    whole.select(range(5)).to_parquet(root / "hub" / "data" / "test-00000-of-00001.parquet")
    (root / "json").mkdir()
    whole.to_json(root / "json" / "train.jsonl")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(on_disk: Path, tmp_path: Path):
    def source(path: str, run: str = "run", **options) -> HuggingFaceSource:
        config = config_class("data_source", USE).model_validate({"use": USE, "path": str(on_disk / path), **options})
        return config.build(BuildContext(run_dir=tmp_path / run, run=run, seed=0))

    return source


LAYOUTS = [("one", None), ("splits", "train"), ("hub", "train"), ("json", "train")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("path", "split"), LAYOUTS)
def test_rows_are_those_that_were_written(load, path: str, split: str | None, streaming: bool) -> None:
    source = load(path, split=split, streaming=streaming, label_field="answer", shuffle_window=4)
    assert [(p.text, p.label) for p in source] == [(f"q{i}", i) for i in range(ROWS)]
    assert source[17].id == f"{split or 'rows'}:17"
    assert [p.label for p in load(path, split=split, streaming=streaming, label_field="answer", limit=6)] == list(range(6))


def read(source: HuggingFaceSource, start: int, end: int) -> list[int]:
    cursor = Cursor(source, 3, True)
    return [cursor.prompt(position).label for position in range(start, end)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("path", "split"), LAYOUTS)
def test_from_any_cut_the_rows_are_those_of_the_undisturbed_run(load, path: str, split: str | None, streaming: bool) -> None:
    options = {"split": split, "streaming": streaming, "label_field": "answer", "shuffle_window": 5}
    undisturbed = read(load(path, **options), 0, 2 * ROWS + 3)
    assert sorted(undisturbed[:ROWS]) == sorted(undisturbed[ROWS : 2 * ROWS]) == list(range(ROWS))
    assert undisturbed[:ROWS] != undisturbed[ROWS : 2 * ROWS] != list(range(ROWS))
    for cut in range(0, 2 * ROWS, 1 if path == "hub" else 7):
        for run in ("run", f"elsewhere-{cut}"):  # with and without what the first life remembered of the stream
            assert read(load(path, run=run, **options), cut, cut + 3) == undisturbed[cut : cut + 3]


def test_a_stream_goes_on_where_it_was_without_reading_what_was_before(load, on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"split": "train", "streaming": True, "label_field": "answer", "shuffle_window": 4}
    first = read(load("hub", **options), 0, ROWS)
    taken = []
    forward = sys.modules["miles_core.data.stream"].StreamedRows._forward

    def spy(self):
        rows = forward(self)
        taken.extend(row["answer"] for row in rows)
        return rows

    monkeypatch.setattr(sys.modules["miles_core.data.stream"].StreamedRows, "_forward", spy)
    assert read(load("hub", **options), 13, 15) == first[13:15]
    assert taken == [12, 13, 14, 15]  # the window that position 13 is in, and the rows were not counted again


def test_a_torn_or_lost_memory_costs_time_only(load, tmp_path: Path) -> None:
    options = {"split": "train", "streaming": True, "label_field": "answer", "shuffle_window": 4}
    first = read(load("hub", **options), 0, ROWS)
    [remembered] = (tmp_path / "run" / "data").glob("*.jsonl")
    whole = remembered.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 3):
        remembered.write_bytes(whole[:length])
        assert read(load("hub", **options), 9, 20) == first[9:20]
        assert {"rows": ROWS} in _facts(remembered)
    remembered.write_text(json.dumps({"rows": ROWS}))  # no window is remembered: it reads forwards to the one it needs
    assert read(load("hub", **options), 9, 20) == first[9:20]


def test_rows_that_the_description_counts_are_not_counted(
    load, on_disk: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The head of README.md, as on the hub. The first prompt costs one window."""
    described = tmp_path_factory.mktemp("set")
    shutil.copytree(on_disk / "hub" / "data", described / "data")
    splits = "".join(f"  - name: {name}\n    num_examples: {rows}\n" for name, rows in (("train", ROWS), ("test", 5)))
    (described / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    source = load(str(described), split="train", streaming=True, label_field="answer", shuffle_window=4, run="described")
    assert len(source) == ROWS
    assert [source[i].label for i in (1, 3)] == [1, 3]
    [remembered] = (tmp_path / "described" / "data").glob("*.jsonl")
    assert [fact["window"] for fact in _facts(remembered)] == [1]
    assert [source[i].label for i in (18, 5, 22)] == [18, 5, 22]


def _facts(remembered: Path) -> list[dict]:
    """What was written whole."""
    facts = []
    for line in remembered.read_text().splitlines():
        with contextlib.suppress(ValueError):
            facts.append(json.loads(line))
    return facts


def test_a_stream_keeps_two_windows_and_asks_for_its_columns_only(load) -> None:
    source = load("hub", split="train", streaming=True, label_field="answer", shuffle_window=3)
    cursor = Cursor(source, 0, True)
    for position in range(ROWS):
        cursor.prompt(position)
        held = source.rows._read
        assert sum(map(len, held.values())) <= 6 and all(row.keys() == {"prompt", "answer"} for rows in held.values() for row in rows)


def test_a_stream_that_ends_early_says_so(load, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = tmp_path_factory.mktemp("set") / "train.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    source = load(str(rows.parent), split="train", streaming=True)
    assert len(source) == 3
    rows.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"ended after 1 rows, 3 were promised"):
        source[2]


@pytest.mark.parametrize(
    ("path", "options", "expected"),
    [
        ("hub", {}, "split is missing"),
        ("hub", {"split": "tset"}, 'Unknown split "tset"'),
        ("hub", {"split": "train", "name": "main"}, "BuilderConfig 'main' not found"),
        ("splits", {"split": "tran"}, "has no split 'tran'. Did you mean 'train'? It has: train, test"),
        ("splits", {}, "has no split None. It has: train, test"),
        ("splits", {"split": "train", "revision": "main"}, "has no revision; leave that out"),
        ("one", {"split": "train"}, "holds one dataset without splits; leave split out"),
        ("nowhere", {"split": "train"}, "there is no directory"),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence(load, path: str, options: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)) as error:
        load(path, **options)
    assert path in str(error.value) or "split is missing" in expected


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_bad_values_and_ids(load, tmp_path_factory: pytest.TempPathFactory, streaming: bool) -> None:
    options = {"split": "train", "streaming": streaming}
    with pytest.raises(DataError, match=r"train has no column 'question'\. It has: prompt, answer, unread"):
        load("hub", prompt_field="question", **options)
    with pytest.raises(DataError, match=r"train row 0: field 'answer' is a int; expected text"):
        load("hub", prompt_field="answer", **options)[0]
    assert load("hub", id_field="answer", **options)[4].id == "4"
    with pytest.raises(DataError, match=r"train row 1: id 'x' is also that of .*train row 0"):
        load("hub", id_field="unread", **options)
    empty = tmp_path_factory.mktemp("set")
    (empty / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match="cannot be loaded: a file without rows"):
        load(str(empty), **options)


def test_the_hub_offline_is_a_sentence() -> None:
    """In a process of its own: the hub's libraries read the variable when they are imported."""
    code = (
        "from miles_core.data.huggingface import HuggingFace\n"
        "from miles_core.protocols import BuildContext\n"
        f"try: HuggingFace(use={USE!r}, path='nobody/nothing', split='train', revision='v1').build(BuildContext('.', 'r', 0))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert "ConfigError" in done.stdout and "nobody/nothing (split train, revision v1) cannot be loaded" in done.stdout, done.stderr
    assert "check the connection, or give a directory" in done.stdout


def test_without_datasets_the_extra_is_named(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PluginError, match=r"'datasets' is not installed; it comes with the extra miles-core\[data\]"):
        load("hub", split="train")


def breaking_once(row: int) -> datasets.IterableDataset:
    """Rows q0 to q39 in four shards; the first time that ``row`` is read, the connection breaks."""
    broken = []

    def rows(shards):
        for number in (n for shard in shards for n in range(10 * shard, 10 * shard + 10)):
            if number == row and not broken:
                broken.append(number)
                raise OSError("connection reset")
            yield {"prompt": f"q{number}"}

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})


@pytest.mark.parametrize("row", [3, 13, 20])
def test_a_stream_that_broke_inside_a_window_goes_on_with_the_right_rows(tmp_path: Path, row: int) -> None:
    """Other groups of the step ask again before the run stops; nor may the next life begin a window where the break was."""
    states = tmp_path / "states.jsonl"
    rows = StreamedRows(breaking_once(row), "d train", "train", 10, 40, None, states)
    with pytest.raises(DataError, match=rf"d train cannot be read in rows {row // 10 * 10} to .*: connection reset"):
        rows[39]
    for number in range(2):
        assert [rows[i]["prompt"] for i in (12, 25, 39, 0)] == ["q12", "q25", "q39", "q0"], f"life {number}"
        rows = StreamedRows(breaking_once(-1), "d train", "train", 10, 40, None, states)


def test_no_window_begins_behind_an_end(tmp_path: Path) -> None:
    """A stream that ended early, once, is no reason to take its end for the begin of a window ever after."""
    states = tmp_path / "states.jsonl"
    rows = [{"prompt": f"q{i}"} for i in range(13)]
    short = StreamedRows(datasets.Dataset.from_list(rows).to_iterable_dataset(), "d train", "train", 10, 40, None, states)
    with pytest.raises(DataError, match="ended after 13 rows, 40 were promised"):
        short[14]
    assert [fact["window"] for fact in _facts(states)] == [1]


def test_a_stream_without_a_readable_row_is_a_sentence(load, tmp_path_factory: pytest.TempPathFactory) -> None:
    broken = tmp_path_factory.mktemp("set")
    (broken / "train.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match=rf"{broken} train cannot be read, not even its first row: "):
        load(str(broken), split="train", streaming=True)


def test_what_was_remembered_of_other_files_is_not_used(load, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("set")
    for prompts in (["a", "b", "c"], ["d", "e", "f", "g", "h"]):
        (directory / "train.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        source = load(str(directory), split="train", streaming=True, shuffle_window=2)
        assert [prompt.text for prompt in source] == prompts
