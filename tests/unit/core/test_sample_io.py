"""Files of samples: bit for bit what was saved, shared images once, and a sentence for a file that is not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures import strategies
from fixtures.samples import HARD_CASES, answer, moe, ragged, sample_id, shared_image
from hypothesis import given
from safetensors import safe_open
from safetensors.numpy import save_file

from miles_core.columns import COLUMNS, Attachments, Blob, Column, Ragged
from miles_core.errors import DataError, RunError
from miles_core.sample import Sample
from miles_core.sample_io import load_samples, save_samples


def bits(column: Column) -> object:
    """Everything about a column that must survive: dtype, shape, bytes (NaN payloads too), spans and blob contents."""
    if isinstance(column, Ragged):
        return bits(column.values), bits(column.offsets)
    if isinstance(column, np.ndarray):
        return column.dtype.str, column.shape, column.tobytes()
    return [(a.start, a.end, {n: bits(t) for n, t in sorted(a.blob.tensors.items())}) for a in column.items], column.length


def scalars(sample: Sample) -> dict:
    return {name: value for name, value in vars(sample).items() if name != "columns"}


def check_round_trip(samples: list[Sample], path: Path) -> list[Sample]:
    save_samples(path, samples)
    read = load_samples(path)
    for was, now in zip(samples, read, strict=True):
        assert scalars(now) == scalars(was)
        assert {n: bits(c) for n, c in now.columns.items()} == {n: bits(c) for n, c in was.columns.items()}
    return read


@pytest.mark.parametrize("name", HARD_CASES)
def test_hard_cases_survive(name: str, tmp_path: Path) -> None:
    check_round_trip(HARD_CASES[name](), tmp_path / "samples")


def test_different_cases_share_a_file(tmp_path: Path) -> None:
    """uint8 and uint16 routing, samples with and without a column, several policies."""
    check_round_trip([s for case in HARD_CASES.values() for s in case()], tmp_path / "samples")


@given(samples=strategies.samples)
def test_random_samples_survive(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> None:
    check_round_trip(samples, tmp_path_factory.getbasetemp() / "random-samples")


def test_nan_payloads_survive(tmp_path: Path) -> None:
    [sample] = ragged()
    sample.columns["values"] = np.array([0x7FC00001, 0xFFC00000, 0x7F800001, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    sample.columns["returns"] = np.array([0x7FF8000000000001, 1, 2, 3, 4], np.uint64).view(np.float64)
    check_round_trip([sample], tmp_path / "samples")


def test_scalars_survive(tmp_path: Path) -> None:
    sample = answer(sample_id(), [1], [2], reward=0.1)
    sample.prompt = [{"role": "user", "content": "Grüße, 世界 \ud83d"}]  # a lone surrogate, as tokenizers may give
    sample.label = {"answer": [1, None, True]}
    sample.rewards = {"correct": 1 / 3}
    sample.metadata = {"nested": {"deep": [1.5]}}
    sample.timings = {"generate": 0.25}
    check_round_trip([sample], tmp_path / "samples")


def test_no_samples_is_a_file_too(tmp_path: Path) -> None:
    check_round_trip([], tmp_path / "samples")


@pytest.mark.slow
def test_more_text_than_a_safetensors_header_holds(tmp_path: Path) -> None:
    """Headers end at 100 MB; prompts of a long-context batch do not."""
    sample = answer(sample_id(), [1], [2], metadata={"transcript": "x" * 101_000_000})
    save_samples(tmp_path / "samples", [sample])
    assert load_samples(tmp_path / "samples")[0].metadata == sample.metadata


def test_a_shared_image_is_written_once(tmp_path: Path) -> None:
    samples = shared_image(members=5)
    read = check_round_trip(samples, tmp_path / "samples")
    with safe_open(tmp_path / "samples", "np") as file:
        assert sum(name.endswith(".pixels") for name in file.keys()) == 1  # noqa: SIM118 (not a dict)
    blobs = {id(a.blob) for s in read if isinstance(c := s.columns["images"], Attachments) for a in c.items}
    assert len(blobs) == 1, "they share one object again"


def test_it_is_plain_safetensors(tmp_path: Path) -> None:
    """Anybody's reader finds the tokens end to end under the column's name and dtype."""
    save_samples(tmp_path / "samples", [*moe(), *ragged()])
    with safe_open(tmp_path / "samples", "np") as file:
        assert file.get_tensor("tokens#int32").tolist() == [5, 6, 10, 11, 12, 5, 6, 10, 11, 1]
        assert file.get_tensor("routing#uint8:3x2").shape == (5, 3, 2)


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    """In the very last byte of the data."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "short of a byte": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cannot be read"),
    "short of everything": (lambda p: p.write_bytes(p.read_bytes()[:20]), "cannot be read"),
    "shifted": (lambda p: p.write_bytes(b"PK\x03\x04" + p.read_bytes()), "cannot be read"),
    "text": (lambda p: p.write_text("not safetensors at all"), "cannot be read"),
    "directory": (lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
    "weights": (lambda p: save_file({"weight": np.zeros(2)}, p), "format None, expected 'miles-samples-1'"),
    "weights of torch": (lambda p: save_file({"weight": np.zeros(2)}, p, metadata={"format": "pt"}), "format 'pt', expected"),
    "flipped bit": (flip_a_bit, "damaged"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT)
def test_a_file_that_is_not_whole_is_refused(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "samples"
    save_samples(path, shared_image())
    spoil(path)
    with pytest.raises(DataError, match=f"{path}: .*{message}"):
        load_samples(path)


def test_every_byte_counts(tmp_path: Path) -> None:
    """A flipped bit anywhere in the data is found, whichever column it hits."""
    path = tmp_path / "samples"
    save_samples(path, ragged())
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in range(start, len(whole), 37):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            load_samples(path)


def test_a_column_nobody_declares_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in that wrote it is not imported here."""
    path = tmp_path / "samples"
    save_samples(path, ragged())
    monkeypatch.delitem(COLUMNS, "support")
    with pytest.raises(DataError, match=rf"{path}: its column 'support' is not declared; import the plug-in"):
        load_samples(path)


@pytest.mark.parametrize("field", ["metadata", "label", "prompt"])
def test_what_is_not_json_is_named(field: str, tmp_path: Path) -> None:
    sample = answer(sample_id(3), [1], [2])
    setattr(sample, field, {"seen": {1, 2}})
    with pytest.raises(DataError, match=r"sample policy/g0/t3\.b0@0: .*not JSON.*set"):
        save_samples(tmp_path / "samples", [sample])
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    save_samples(path, ragged())
    (tmp_path / "samples.partial").mkdir()  # stands for a disk that cannot be written to
    with pytest.raises(RunError, match=rf"{path}: samples cannot be written.*room on the disk"):
        save_samples(path, moe())
    assert len(load_samples(path)) == 1 and "support" in load_samples(path)[0].columns


def test_blobs_with_the_same_tensors_are_the_same(tmp_path: Path) -> None:
    """Two samples that loaded the same picture each for itself share it in the file."""
    one, two = shared_image(1)[0], shared_image(1)[0]
    two.id = sample_id(1)
    first, second = one.columns["images"], two.columns["images"]
    assert isinstance(first, Attachments) and isinstance(second, Attachments) and first.items[0].blob is not second.items[0].blob
    read = check_round_trip([one, two], tmp_path / "samples")
    assert {type(a.blob) for s in read if isinstance(c := s.columns["images"], Attachments) for a in c.items} == {Blob}
    with safe_open(tmp_path / "samples", "np") as file:
        assert sum(name.startswith("blob.") for name in file.keys()) == 3  # noqa: SIM118 (pixels, grid, scale)


def test_scalars_are_json_in_a_tensor(tmp_path: Path) -> None:
    """People and other tools can read them without us."""
    save_samples(tmp_path / "samples", moe())
    with safe_open(tmp_path / "samples", "np") as file:
        [header] = json.loads(file.get_tensor("samples").tobytes())
    assert header["id"]["policy"] == "policy" and header["reward"] == 1.0 and header["length"] == 5
