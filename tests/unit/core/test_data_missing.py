"""What a data source lacks on this machine is said before anything is built: a later stage's path must not be found missing after hours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miles_core.check import missing
from miles_core.config import RunConfig, resolve
from miles_core.errors import ConfigError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext


def lacks(**options: Any) -> list[str]:
    return config_class("data_source", options["use"]).model_validate(options).missing()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use": "jsonl", "path": "ROOT/row.jsonl"}, "path: there is no file ROOT/row.jsonl. Did you mean 'rows.jsonl'? "),
        (
            {"use": "jsonl", "path": "${NOT_SET}/rows.jsonl"},
            "path is '${NOT_SET}/rows.jsonl', but the environment variable NOT_SET is not set",
        ),
        ({"use": "parquet", "path": "ROOT/tain-*.parquet"}, "path: there is no file, directory or match of ROOT/tain-*.parquet."),
        ({"use": "parquet", "path": "ROOT/none"}, "path: no *.parquet file is in ROOT/none or below"),
        ({"use": "huggingface", "path": "ROOT/nowhere", "split": "train"}, "path: there is no directory ROOT/nowhere, and it is no name"),
        ({"use": "gsm8k", "path": "ROOT"}, "path: there is no file ROOT/train.jsonl."),
    ],
)
def test_what_is_not_there_is_said_and_building_says_the_same(tmp_path: Path, monkeypatch, options: dict, said: str) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "none").mkdir()
    options = options | {"path": options["path"].replace("ROOT", str(tmp_path))}
    [sentence] = lacks(**options)
    assert sentence.startswith(said.replace("ROOT", str(tmp_path)))
    with pytest.raises(ConfigError) as error:
        config_class("data_source", options["use"]).model_validate(options).build(BuildContext(tmp_path, "r", 0))
    assert str(error.value) == f"data_source {options['use']}: {sentence}"


def test_what_is_there_lacks_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "train.parquet")
    assert lacks(use="jsonl", path=f"{tmp_path}/train.jsonl") == []
    for path in ("", "/train.parquet", "/*.parquet"):
        assert lacks(use="parquet", path=f"{tmp_path}{path}") == []
    for path in (str(tmp_path), "owner/name"):  # the hub is not asked
        assert lacks(use="huggingface", path=path, split="train") == []
    assert lacks(use="gsm8k", path=str(tmp_path)) == lacks(use="gsm8k", path="hub") == []


@pytest.mark.parametrize(
    ("use", "path", "library"), [("parquet", ".", "pyarrow"), ("huggingface", "a/b", "datasets"), ("gsm8k", "hub", "datasets")]
)
def test_a_library_that_is_not_installed_is_said_with_its_extra(monkeypatch, tmp_path: Path, use: str, path: str, library: str) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    assert lacks(use=use, path=path) == [f"{library} is not installed; pip install 'miles-core[data]'"]


def test_the_parts_of_a_mixture_are_asked(tmp_path: Path) -> None:
    """As a run asks, whatever the depth."""
    inner = {"use": "mixture", "parts": {"deep": {"data": {"use": "jsonl", "path": f"{tmp_path}/deep.jsonl"}, "weight": 1}}}
    tree = resolve("quickstart", []).model_dump()
    stage = next(iter(tree["stages"].values()))
    stage["data"] = {
        "use": "mixture",
        "parts": {"a": {"data": inner, "weight": 1}, "b": {"data": {"use": "parquet", "path": f"{tmp_path}/b"}, "weight": 1}},
    }
    sentences = missing(RunConfig.model_validate(tree))
    assert any(s.startswith(f"data_source 'jsonl': path: there is no file {tmp_path}/deep.jsonl") for s in sentences)
    assert any(s.startswith(f"data_source 'parquet': path: there is no file, directory or match of {tmp_path}/b") for s in sentences)
