"""The table of columns: three kinds, each with the same operations; one declaration is all that a new column needs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fixtures.samples import answer, sample_id
from hypothesis import given
from hypothesis import strategies as st

from miles_core.batch import Batch
from miles_core.columns import (
    COLUMNS,
    Attachment,
    Attachments,
    Blob,
    Column,
    ColumnSpec,
    Ragged,
    check_column,
    column_spec,
    concat_columns,
    empty_column,
    register_column,
    slice_column,
    take_rows,
)
from miles_core.errors import DataError
from miles_core.refs import SampleRef
from miles_core.sample import Sample
from miles_core.sample_io import load_samples, save_samples


@pytest.fixture
def table() -> Iterator[None]:
    """Columns declared in a test are gone after it."""
    before = dict(COLUMNS)
    yield
    COLUMNS.clear()
    COLUMNS.update(before)


def rows_of(column: Column) -> list:
    """A column as plain lists, one item a token, for comparing kinds alike."""
    if isinstance(column, Ragged):
        return [column.row(t).tolist() for t in range(len(column))]
    if isinstance(column, Attachments):
        return [[a.blob.key for a in column.items if a.start <= t < a.end] for t in range(len(column))]
    return column.tolist()


# ---- ragged ---------------------------------------------------------------------------------------------------------


def test_ragged_rows() -> None:
    ragged = Ragged.of([[1, 2], [], [3]], "int32")
    assert len(ragged) == 3 and ragged.values.dtype == np.int32
    assert ragged.offsets.tolist() == [0, 2, 2, 3] and ragged.offsets.dtype == np.int64
    assert [ragged.row(t).tolist() for t in range(3)] == [[1, 2], [], [3]]


def test_ragged_of_nothing() -> None:
    assert len(Ragged.of([], "float32")) == 0
    assert Ragged.of([[], []], "float32").values.dtype == np.float32


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=6), st.data())
def test_ragged_take_is_list_indexing(rows: list[list[int]], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(-1, len(rows) - 1), max_size=8))
    taken = Ragged.of(rows, "int32").take(np.array(wanted, np.int64))
    assert rows_of(taken) == [rows[w] if w >= 0 else [] for w in wanted]


def test_ragged_values_may_have_axes() -> None:
    ragged = Ragged(np.arange(6.0).reshape(3, 2), np.array([0, 1, 3]))
    assert ragged.take(np.array([1, -1])).values.tolist() == [[2, 3], [4, 5]]


# ---- attachments ----------------------------------------------------------------------------------------------------


def test_blob_is_addressed_by_what_is_in_it() -> None:
    image = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = Blob({"pixels": np.asfortranarray(image)})
    assert Blob({"pixels": image}) == same and len({Blob({"pixels": image}), same}) == 1
    others = ({"pixels": image + 1}, {"pixels": image.astype(np.float64)}, {"pixels": image.reshape(3, 2)}, {"audio": image})
    assert all(Blob(other) != same for other in others)


def test_cutting_through_an_attachment_is_refused() -> None:
    column = Attachments((Attachment(2, 5, Blob({"x": np.zeros(1)})),), 8)
    spec = column_spec("images")
    assert slice_column(spec, column, 2, 5) == Attachments((Attachment(0, 3, column.items[0].blob),), 3)
    assert slice_column(spec, column, 5, 8) == Attachments((), 3)
    with pytest.raises(DataError, match=r"'images'.*\[3, 8\).*attachment over \[2, 5\)"):
        slice_column(spec, column, 3, 8)


# ---- every kind alike -----------------------------------------------------------------------------------------------

BLOB = Blob({"x": np.zeros(2)})
ONE_OF_EACH: dict[str, Column] = {
    "tokens": np.array([4, 5, 6, 7], np.int32),
    "routing": np.arange(16, dtype=np.uint8).reshape(4, 2, 2),
    "logprobs": np.array([np.nan, -1, -2, np.nan], np.float32),
    "support": Ragged.of([[], [1, 2], [3], []], "int32"),
    "images": Attachments((Attachment(1, 2, BLOB), Attachment(2, 4, BLOB)), 4),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_slices_put_together_are_the_whole(name: str) -> None:
    spec, column = column_spec(name), ONE_OF_EACH[name]
    for cuts in ([0, 2, 4], [0, 1, 2, 4], [0, 0, 4, 4]):
        parts = [slice_column(spec, column, s, e) for s, e in pairwise(cuts)]
        whole = concat_columns(spec, parts)
        np.testing.assert_equal(rows_of(whole), rows_of(column))
        assert check_column(spec, whole, 4) is None


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_empty_column_is_valid_and_fits_its_like(name: str) -> None:
    spec, like = column_spec(name), ONE_OF_EACH[name]
    empty = empty_column(spec, 3, like)
    assert check_column(spec, empty, 3) is None
    assert len(concat_columns(spec, [like, empty])) == 7
    assert check_column(spec, empty_column(spec, 3), 3) is None


@pytest.mark.parametrize(
    ("name", "fill"), [("tokens", 0), ("versions", -1), ("loss_mask", False), ("advantages", 0.0), ("logprobs", np.nan)]
)
def test_missing_rows_hold_the_fill(name: str, fill: float) -> None:
    spec = column_spec(name)
    column = np.ones(3, spec.dtypes[0])
    np.testing.assert_equal(take_rows(spec, column, np.array([2, -1, 0])), np.array([1, fill, 1], spec.dtypes[0]))
    np.testing.assert_equal(empty_column(spec, 2), np.array([fill, fill], spec.dtypes[0]))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_sentinel_of_routing_is_the_maximum_of_its_dtype(dtype: str) -> None:
    column = np.zeros((2, 1, 1), dtype)
    assert rows_of(take_rows(column_spec("routing"), column, np.array([-1]))) == [[[{"uint8": 255, "uint16": 65535}[dtype]]]]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("routing", [np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 2), np.uint16)]),
        ("routing", [np.zeros((1, 2, 2), np.uint8), np.zeros((1, 3, 2), np.uint8)]),
        ("support", [Ragged.of([[1]], "int32"), Ragged.of([[1]], "int64")]),
        ("support", [Ragged(np.zeros((1, 2), np.int32), np.array([0, 1])), Ragged.of([[1]], "int32")]),
    ],
)
def test_columns_of_different_form_are_not_put_together(name: str, columns: list[Column]) -> None:
    with pytest.raises(DataError, match=f"'{name}'.*different dtypes or trailing shapes"):
        concat_columns(column_spec(name), columns)


def test_attachments_are_not_taken_by_rows() -> None:
    with pytest.raises(DataError, match=r"'images'.*whole"):
        take_rows(column_spec("images"), ONE_OF_EACH["images"], np.array([0]))


# ---- the table ------------------------------------------------------------------------------------------------------


def test_an_unknown_column_is_a_sentence() -> None:
    with pytest.raises(DataError, match=r"unknown column 'rewardz'.*tokens.*register_column"):
        column_spec("rewardz")


def test_declaring_twice(table: None) -> None:
    register_column(ColumnSpec("surprise", "token", ("float32",), float("nan")))
    register_column(ColumnSpec("surprise", "token", ("float32",), float("nan")))  # a module that is imported twice
    with pytest.raises(DataError, match=r"'surprise' is declared twice and differently"):
        register_column(ColumnSpec("surprise", "token", ("float32",), 0.0))


@pytest.mark.usefixtures("table")
def test_one_declaration_is_all_a_new_column_needs(tmp_path: Path) -> None:
    """Three kinds, declared here, go through validate, slice, concatenate, pack, select, split, unpack and the file."""
    register_column(ColumnSpec("gates", "token", ("float32",), -5.0, trailing=1, rolled=True))
    register_column(ColumnSpec("hints", "ragged", ("float32",), 0.0, trailing=1))
    register_column(ColumnSpec("video", "attachment", (), None, rolled=False, split="whole"))
    sample = answer(sample_id(0), [1, 2], [3, 4], reward=0.0)
    gates = np.arange(8, dtype=np.float32).reshape(4, 2)
    hints = Ragged(np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 0, 1, 3, 3]))
    sample.columns |= {"gates": gates, "hints": hints, "video": Attachments((Attachment(0, 2, BLOB),), 4)}
    plain = answer(sample_id(1), [1], [2], reward=0.0)
    sample.validate()

    cut = Sample.concat([sample.slice(0, 2), sample.slice(2, 4)])
    for name in ("gates", "hints", "video"):
        np.testing.assert_equal(rows_of(cut.columns[name]), rows_of(sample.columns[name]))

    save_samples(tmp_path / "samples", [plain, sample])
    read = load_samples(tmp_path / "samples")
    assert "gates" not in read[0].columns
    for name in ("gates", "hints", "video"):
        np.testing.assert_equal(rows_of(read[1].columns[name]), rows_of(sample.columns[name]))

    batch = Batch.of([SampleRef.of(plain), SampleRef.of(sample)]).load(["gates", "hints", "video"])
    packed = [[-5, -5], [-5, -5], [2, 3], [4, 5], [6, 7], [-5, -5]]  # rolled by −1 in each sample
    assert batch.array("gates").tolist() == packed
    assert rows_of(batch.columns["hints"]) == [[], [], [[0, 1]], [[2, 3], [4, 5]], [], []]
    assert rows_of(batch.columns["video"]) == [[], [], [BLOB.key], [BLOB.key], [], []]
    assert batch.select([1]).array("gates").tolist() == packed[2:]
    shard = batch.context_shard(0, 2)
    assert shard.array("gates").tolist() == [packed[r] for r in batch.context_rows(0, 2)]
    assert shard.columns["video"] is batch.columns["video"]
    unpacked = batch.unpack("gates")[1]
    assert isinstance(unpacked, np.ndarray)
    assert unpacked.tolist() == [[-5, -5], *gates.tolist()[1:]]  # row 0 speaks of token 0, which nothing predicts
