"""Parquet: every row once an epoch in a seeded order, from any cut on the same; little in memory; a sentence for every bad file."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.cursor import Cursor
from miles_core.data.order import Blocks
from miles_core.data.parquet import ParquetFiles, ParquetSource
from miles_core.errors import ConfigError, DataError, PluginError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, DataSource
from miles_core.tokenizers import TokenizerConfig, build_tokenizer

USE = "miles_core.data.parquet:Parquet"


def open_source(path: Path, **options) -> ParquetSource:
    config = config_class("data_source", USE).model_validate({"use": USE, "path": str(path), **options})
    return config.build(BuildContext(run_dir=path, run="test", seed=0))


def write(path: Path, row_groups: list[int], first: int = 0) -> int:
    """A file with such row groups of rows numbered from ``first``; the next number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("prompt", pa.string()), ("answer", pa.int64()), ("unread", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for size in row_groups:
            numbers = list(range(first, first + size))
            rows = {"prompt": [f"q{n}" for n in numbers], "answer": numbers, "unread": ["x" * 1000] * size}
            if size:
                writer.write_table(pa.table(rows, schema))
            first += size
    return first


def shards(directory: Path, layout: list[list[int]]) -> Path:
    first = 0
    for number, row_groups in enumerate(layout):
        first = write(directory / f"train-{number:03d}.parquet", row_groups, first)
    return directory


# ---- order ----------------------------------------------------------------------------------------------------------

LAYOUT = [[4, 3], [5], [], [1, 1, 6]]
ROWS = 20


def read(source: DataSource, start: int, end: int, *, seed: int = 3, shuffle: bool = True) -> list[int]:
    cursor = Cursor(source, seed, shuffle)
    return [cursor.prompt(position).label for position in range(start, end)]


def test_rows_are_those_of_the_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Against pyarrow reading all of it at once."""
    source = open_source(shards(tmp_path, LAYOUT), label_field="answer")
    table = pa.concat_tables(pq.read_table(path) for path in sorted(tmp_path.glob("*.parquet")))
    assert [(p.text, p.label) for p in source] == list(zip(table["prompt"].to_pylist(), table["answer"].to_pylist(), strict=True))
    assert [source[i].id for i in (0, 6, 7, 12, 19)] == [
        "train-000.parquet:0",
        "train-000.parquet:6",
        "train-001.parquet:0",
        "train-003.parquet:0",
        "train-003.parquet:7",
    ]
    assert read(source, 0, 45, shuffle=False) == [*range(20), *range(20), *range(5)]


@given(
    layout=st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1, max_size=4).filter(lambda files: any(files)),
    window=st.integers(1, 30),
    seed=st.integers(0, 2**64 - 1),
    limit=st.none() | st.integers(1, 30),
    data=st.data(),
)
def test_from_any_cut_the_rows_are_those_of_the_undisturbed_run(tmp_path_factory, layout, window, seed, limit, data) -> None:
    """A source of a new process, asked from a position on, gives what the first one gave; every epoch holds every row once."""
    directory = shards(tmp_path_factory.mktemp("cut"), layout)
    options = {"label_field": "answer", "shuffle_window": window, "limit": limit}
    source = open_source(directory, **options)
    rows = min(sum(map(sum, layout)), limit or 1000)
    assert len(source) == rows
    undisturbed = read(source, 0, 3 * rows, seed=seed)
    cut = data.draw(st.integers(0, 3 * rows))
    assert read(open_source(directory, **options), cut, 3 * rows, seed=seed) == undisturbed[cut:]
    for epoch in range(3):
        assert sorted(undisturbed[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), window=st.integers(1, 40), movable=st.booleans())
def test_a_window_is_whole_blocks_and_no_larger_than_said(sizes: list[int], window: int, movable: bool) -> None:
    """From the order alone: it can be cut into stretches of whole blocks, each no longer than the window or a single block."""
    order = Blocks(np.array(sizes), window, movable=movable)
    owners = np.repeat(np.arange(len(sizes)), sizes)[[order.index(i, 7, "epoch", 2) for i in range(sum(sizes))]].tolist()
    while owners:
        stretches = [owners[:n] for n in range(1, len(owners) + 1)]
        whole = [s for s in stretches if all(count == sizes[block] for block, count in Counter(s).items())]
        fitting = [s for s in whole if len(s) <= window or len(set(s)) == 1]
        assert fitting, (sizes, owners)
        owners = owners[len(fitting[-1]) :]


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), seed=st.integers(0, 100))
def test_rows_that_are_left_out_leave_their_blocks(sizes: list[int], seed: int) -> None:
    kept = np.flatnonzero(np.random.default_rng(seed).random(sum(sizes)) < 0.6)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    left = Blocks(np.array(sizes), 4, movable=True).only(kept)
    assert left.sizes.tolist() == np.bincount(owner[kept], minlength=len(sizes)).tolist()


def test_a_stream_keeps_the_order_of_its_windows() -> None:
    order = Blocks(np.array([4, 4, 4, 2]), 4, movable=False)
    rows = [order.index(i, "seed") for i in range(14)]
    assert [sorted(rows[i : i + 4]) for i in range(0, 14, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]
    assert rows != sorted(rows)


def test_what_fits_in_one_window_is_shuffled_evenly() -> None:
    """Each row is at each place equally often: 9 · 9 counts of 900 epochs, each Binomial(900, 1/9), none further than 5 σ away."""
    order, epochs = Blocks(np.array([2, 3, 4]), 9, movable=True), 900
    counts = np.zeros((9, 9))
    for epoch in range(epochs):
        for place in range(9):
            counts[place, order.index(place, 0, "epoch", epoch)] += 1
    sigma = np.sqrt(epochs * (1 / 9) * (8 / 9))
    assert np.abs(counts - epochs / 9).max() < 5 * sigma


def test_what_is_left_out_comes_in_no_epoch(tmp_path: Path) -> None:
    """``q0`` … ``q9`` have two tokens, the ten after them three."""
    tokenizer = build_tokenizer(TokenizerConfig(kind="words", words=("q", *"0123456789")), ["q0"])
    source = open_source(shards(tmp_path, LAYOUT), label_field="answer", shuffle_window=4, max_prompt_tokens=2, too_long="drop")
    assert source.use_tokenizer(tokenizer)
    epochs = [read(source, start, start + 10) for start in range(0, 50, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 5


def test_seeds_and_epochs_differ(tmp_path: Path) -> None:
    source = open_source(shards(tmp_path, LAYOUT), label_field="answer", shuffle_window=8)
    orders = {tuple(read(source, e * ROWS, (e + 1) * ROWS, seed=s)) for e in range(5) for s in range(5)}
    assert len(orders) == 25


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_an_epoch_reads_each_row_group_once_and_keeps_two_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when groups that are in flight ask out of order, and only the columns that are wanted."""
    write(tmp_path / "rows.parquet", [50] * 40)
    source = open_source(tmp_path / "rows.parquet", label_field="answer", shuffle_window=200)
    reads, held = [], []
    load = ParquetFiles._load

    def spy(self, group, columns):
        table = load(self, group, columns)
        reads.append(group.number)
        held.append(pa.total_allocated_bytes())
        assert table.column_names == ["prompt", "answer"]
        return table

    monkeypatch.setattr(ParquetFiles, "_load", spy)
    cursor, rng = Cursor(source, 1, True), np.random.default_rng(0)
    before = pa.total_allocated_bytes()
    for start in range(0, 2000, 20):
        for position in start + rng.permutation(20):
            cursor.prompt(int(position))
    assert sorted(reads) == list(range(40))
    whole = pq.read_table(tmp_path / "rows.parquet", columns=["prompt", "answer"]).nbytes
    assert max(held) - before < whole / 2  # two windows of ten, and the row group that is being read


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_where_the_rows_are(tmp_path: Path) -> None:
    shards(tmp_path / "data", [[2], [3]])
    write(tmp_path / "data" / "deep" / "more.parquet", [4])
    assert len(open_source(tmp_path / "data")) == 9
    assert len(open_source(tmp_path / "data" / "train-*.parquet")) == 5
    assert len(open_source(tmp_path / "data" / "train-001.parquet")) == 3
    assert open_source(tmp_path / "data" / "**" / "*.parquet")[0].id == "deep/more.parquet:0"
    with pytest.raises(ConfigError, match=r"there is no file, directory or match of .*train-01\.parquet\. Did you mean 'train-001"):
        open_source(tmp_path / "data" / "train-01.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.parquet file is in .*empty or below"):
        open_source(tmp_path / "empty")


def test_a_shard_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    shards(tmp_path, [[2], [3]])
    (tmp_path / "train-001.parquet").write_text('{"prompt": "json"}\n')
    with pytest.raises(DataError, match=r"train-001\.parquet is no Parquet file, or not a whole one"):
        open_source(tmp_path)
    whole = (tmp_path / "train-000.parquet").read_bytes()
    (tmp_path / "train-001.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-001\.parquet is no Parquet file, or not a whole one"):
        open_source(tmp_path)


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rows.parquet", [100, 100])
    source = open_source(tmp_path / "rows.parquet")
    column = pq.read_metadata(tmp_path / "rows.parquet").row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    with (tmp_path / "rows.parquet").open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * column.total_compressed_size)
    assert source[0].text == "q0"
    with pytest.raises(DataError, match=r"row group 1 of .*rows\.parquet cannot be read"):
        source[150]


def test_no_rows_and_missing_columns(tmp_path: Path) -> None:
    write(tmp_path / "none.parquet", [])
    with pytest.raises(DataError, match=r"none\.parquet has no rows"):
        open_source(tmp_path / "none.parquet")
    write(tmp_path / "rows.parquet", [2])
    expected = r"rows\.parquet has no column 'promt'. Did you mean 'prompt'\? It has: prompt, answer, unread"
    with pytest.raises(DataError, match=expected):
        open_source(tmp_path / "rows.parquet", prompt_field="promt")
    for options in ({"template": "{prompt} {hint[0]}"}, {"metadata_fields": ["hint"]}, {"rejected_field": "hint"}, {"id_field": "hint"}):
        with pytest.raises(DataError, match="has no column 'hint'"):
            open_source(tmp_path / "rows.parquet", **options)


@pytest.mark.parametrize(
    ("column", "options", "expected"),
    [
        ({"prompt": ["a", None]}, {}, "field 'prompt' is null"),
        ({"prompt": [1, 2]}, {}, "field 'prompt' is a int; expected text"),
        ({"prompt": ["a", " "]}, {}, "field 'prompt' is empty"),
        ({"prompt": ["a", "b"], "label": [1, None]}, {"label_field": "label"}, "field 'label' is null"),
        (
            {"prompt": ["a", "b"], "day": [None, datetime.date(2026, 1, 1)]},
            {"metadata_fields": ["day"]},
            "field 'day' holds a date, which JSON has not",
        ),
        ({"prompt": ["a", "b"], "label": [b"1", b"2"]}, {"label_field": "label"}, "field 'label' holds a bytes, which JSON has not"),
    ],
)
def test_a_bad_value_names_file_and_row(tmp_path: Path, column: dict, options: dict, expected: str) -> None:
    pq.write_table(pa.table(column), tmp_path / "rows.parquet", row_group_size=1)
    with pytest.raises(DataError, match=re.escape(expected)) as error:
        open_source(tmp_path / "rows.parquet", **options)[1]
    assert "rows.parquet row 1" in str(error.value)


def test_ids_must_be_unique_over_all_shards(tmp_path: Path) -> None:
    for name, ids in (("a", [1, 2]), ("b", [3, 2])):
        pq.write_table(pa.table({"prompt": ["x", "y"], "id": ids}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"b\.parquet row 1: id '2' is also that of .*a\.parquet row 1"):
        open_source(tmp_path, id_field="id")
    assert open_source(tmp_path, id_field="id", limit=3)[2].id == "3"


def test_metadata_goes_along(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "level": [3], "tags": [["x", "y"]], "none": [None]}), tmp_path / "rows.parquet")
    assert open_source(tmp_path / "rows.parquet", metadata_fields=["level", "tags", "none"])[0].metadata == {"level": 3, "tags": ["x", "y"]}
    with pytest.raises(ValueError, match="metadata 'response' is what the policy wrote"):
        open_source(tmp_path / "rows.parquet", metadata_fields=["response"])


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    write(tmp_path / "rows.parquet", [2])
    for name in [n for n in sys.modules if n.split(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PluginError, match=r"'pyarrow.*' is not installed; it comes with the extra miles-core\[data\]"):
        open_source(tmp_path / "rows.parquet")


def test_a_column_of_the_first_rows_reads_their_row_groups_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(shards(tmp_path, LAYOUT).glob("*.parquet"))
    rows = ParquetFiles(files, tmp_path, ["answer"], 4, limit=6)
    load, read = ParquetFiles._load, []
    monkeypatch.setattr(ParquetFiles, "_load", lambda self, group, columns: read.append(group.number) or load(self, group, columns))
    assert list(rows.column("answer")) == list(range(6)) and read == [0, 1]
