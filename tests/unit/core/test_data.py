"""Data sources: what a row becomes, and a sentence with file and line for every row that cannot become a prompt."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.gsm8k import CONTEXT, gsm8k, gsm8k_directory
from pydantic import ValidationError

from miles_core.data.gsm8k import Gsm8k, Gsm8kSource, final_answer, passages
from miles_core.data.jsonl import JsonlSource
from miles_core.errors import ConfigError, DataError
from miles_core.plugins import config_class


@pytest.fixture
def rows(tmp_path: Path):
    """A source over lines written to rows.jsonl; objects are dumped, texts and bytes written as they are."""

    def source(lines: list, **options) -> JsonlSource:
        written = [
            line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode() for line in lines
        ]
        (tmp_path / "rows.jsonl").write_bytes(b"".join(line + b"\n" for line in written))
        config = config_class("data_source", "jsonl").model_validate({"use": "jsonl", "path": str(tmp_path / "rows.jsonl"), **options})
        return config.build(CONTEXT)

    return source


def test_a_row_becomes_a_prompt(rows) -> None:
    source = rows(
        [{"q": "1 + 1", "a": 2, "hint": "count", "why": "two ones", "worse": "three", "name": "first"}],
        prompt_field="q",
        label_field="a",
        demonstration_field="why",
        rejected_field="worse",
        id_field="name",
        template="{prompt} ({hint}) = {{?}}",
    )
    prompt = source[0]
    assert (prompt.id, prompt.text, prompt.label) == ("first", "1 + 1 (count) = {?}", 2)
    assert [(p.text, p.trained) for p in prompt.demonstration] == [("two ones", True)]
    assert [(p.text, p.trained) for p in prompt.rejected] == [("three", True)]


def test_ids_are_file_and_line_and_blank_lines_are_skipped(rows) -> None:
    source = rows(["", {"prompt": "a"}, "  ", {"prompt": "b"}])
    assert [source[i].id for i in range(len(source))] == ["rows.jsonl:2", "rows.jsonl:4"]
    assert [p.text for p in source] == ["a", "b"]  # an IndexError ends iteration


def test_lines_end_at_newlines_only(rows) -> None:
    """U+2028 is a line separator to str.splitlines, and stands in real GSM8K rows; JSON allows it unescaped."""
    source = rows(['{"prompt": "a\u2028b"}', {"prompt": "c"}])
    assert [p.text for p in source] == ["a\u2028b", "c"]


def test_limit_takes_the_first_rows(rows) -> None:
    assert [p.text for p in rows([{"prompt": "a"}, {"prompt": "b"}, "{broken"], limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ("{broken", {}, "is not JSON"),
        (b'{"prompt": "\xff"}', {}, "is not JSON"),
        ('["a"]', {}, "holds a list; expected a JSON object"),
        ({"promt": "a"}, {}, "'prompt' is missing. Did you mean 'promt'?"),
        ({"prompt": None}, {}, "'prompt' is null"),
        ({"prompt": 3}, {}, "'prompt' is a int; expected text"),
        ({"prompt": "  "}, {}, "'prompt' is empty"),
        ({"prompt": "a"}, {"label_field": "answer"}, "'answer' is missing"),
        ({"prompt": "a", "answer": None}, {"label_field": "answer"}, "'answer' is null"),
        ({"prompt": "a", "why": ["b"]}, {"demonstration_field": "why"}, "'why' is a list; expected text"),
        ({"prompt": "a"}, {"template": "{prompt} {hint}"}, "the template names 'hint', which is missing"),
        ({"prompt": "a", "n": "x"}, {"template": "{n:d}"}, "the template '{n:d}' cannot be filled"),
    ],
)
def test_a_malformed_row_names_file_and_line(rows, row, options: dict, expected: str) -> None:
    good = {"prompt": "fine", "answer": 1, "why": "because", "hint": "h", "n": 1}
    source = rows([good, row], **options)
    assert source[0].text
    with pytest.raises(DataError, match=re.escape(expected)) as error:
        source[1]
    assert "rows.jsonl:2" in str(error.value)


@pytest.mark.parametrize(
    ("ids", "expected"), [([1, 1], "id '1' is also that of"), ([1, True], "an id is text or a whole number"), (["a", ""], "an id is text")]
)
def test_ids_must_be_unique(rows, ids: list, expected: str) -> None:
    """Randomness and ledgers are keyed by the id, so this is found before the first prompt is used."""
    with pytest.raises(DataError, match=expected) as error:
        rows([{"prompt": "a", "id": i} for i in ids], id_field="id")
    assert "rows.jsonl:2" in str(error.value)


def test_an_empty_file_is_an_error(rows) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl is empty"):
        rows(["", " "])


def test_a_missing_file_names_its_neighbour(rows, tmp_path: Path) -> None:
    rows([{"prompt": "a"}])
    with pytest.raises(ConfigError, match=r"jsonl: path: there is no file .*row\.jsonl.* Did you mean 'rows\.jsonl'"):
        rows([{"prompt": "a"}], path=str(tmp_path / "row.jsonl"))


def test_variables_and_home_in_paths(rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS_ARE_IN", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("${ROWS_ARE_IN}/rows.jsonl", "~/rows.jsonl"):
        assert rows([{"prompt": "a"}], path=path)[0].text == "a"
    monkeypatch.delenv("ROWS_ARE_IN")
    with pytest.raises(ConfigError, match=r"jsonl: path.*ROWS_ARE_IN is not set"):
        rows([{"prompt": "a"}], path="${ROWS_ARE_IN}/rows.jsonl")


@pytest.mark.parametrize("template", ["{}", "{0}", "{prompt"])
def test_a_template_names_its_fields(rows, template: str) -> None:
    with pytest.raises(ValidationError):
        rows([{"prompt": "a"}], template=template)


def test_memory_holds_offsets_not_rows(rows) -> None:
    import tracemalloc

    source = rows([{"prompt": "x" * 1000}] * 5000)
    tracemalloc.start()
    again = JsonlSource(source.config, CONTEXT)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(again) == 5000
    assert held < 5000 * 40  # two int64 a row; the file is 5 MB


# ---- GSM8K ----------------------------------------------------------------------------------------------------------

SOLUTION = "48/2 = <<48/2=24>>24 clips\n48+24 = <<48+24=72>>72 > 70\n#### 1,072"


def test_a_solution_is_cut_where_the_calculator_speaks() -> None:
    assert [(p.text, p.trained) for p in passages(SOLUTION, "here")] == [
        ("48/2 = <<48/2=", True),
        ("24>>", False),
        ("24 clips\n48+24 = <<48+24=", True),
        ("72>>", False),
        ("72 > 70\n#### 1,072", True),
    ]
    assert final_answer(SOLUTION, "here") == "1072"


@pytest.mark.parametrize(
    "answer",
    ["no end", "so\n#### five", "#### 5 \nmore", "a <<1+1=2 b\n#### 2", "a <<1+1>>2\n#### 2", "a >> b\n#### 2", "<<1=1<<2=2>>\n#### 2"],
)
def test_a_malformed_solution_names_file_and_line(tmp_path: Path, answer: str) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "Why?", "answer": answer}) + "\n")
    source = Gsm8kSource(Gsm8k(use="gsm8k", path=str(tmp_path), split="test"), CONTEXT)
    with pytest.raises(DataError, match=r"test\.jsonl:1"):
        source[0]


def test_without_a_directory_the_variable_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MILES_GSM8K", raising=False)
    with pytest.raises(ConfigError, match="MILES_GSM8K is not set"):
        Gsm8kSource(Gsm8k(use="gsm8k"), CONTEXT)
    monkeypatch.setenv("MILES_GSM8K", str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no file .*train\.jsonl"):
        Gsm8kSource(Gsm8k(use="gsm8k"), CONTEXT)


def test_the_hub_offline_is_a_sentence() -> None:
    """In a process of its own: the hub's libraries read the variable when they are imported."""
    code = (
        "from miles_core.data.gsm8k import Gsm8k, Gsm8kSource\n"
        "try: Gsm8kSource(Gsm8k(use='gsm8k', path='hub'), None)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": "/nonexistent", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert "ConfigError" in done.stdout and "or set path to a directory" in done.stdout, done.stderr


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_real_row_parses(split: str, count: int) -> None:
    """Against the raw rows: nothing lost, injected pieces are exactly the results of the annotations, the label is the last line's."""
    source = gsm8k(split)
    raw = [json.loads(line) for line in (gsm8k_directory() / f"{split}.jsonl").read_bytes().split(b"\n") if line]
    assert len(source) == len(raw) == count
    for prompt, row in zip(source, raw, strict=True):
        assert prompt.text == f"Question: {row['question']}\nAnswer:\n"
        assert "".join(p.text for p in prompt.demonstration) == row["answer"]
        injected = [p.text for p in prompt.demonstration if not p.trained]
        assert injected == [note.split("=", 1)[1] + ">>" for note in re.findall(r"<<(.*?)>>", row["answer"])]
        assert str(prompt.label) == row["answer"].split("#### ")[1].replace(",", "")
        assert math.isfinite(float(prompt.label))
        assert prompt.demonstration[-1].trained and all(p.trained for p in prompt.demonstration if "####" in p.text)
    assert len({p.id for p in source}) == count


def test_a_subset_is_seeded_and_of_the_split() -> None:
    whole = {p.id: p for p in gsm8k("test")}
    first, again, other = (gsm8k("test", subset={"size": 64, "seed": seed}) for seed in (0, 0, 1))
    ids = [p.id for p in first]
    assert len(set(ids)) == 64 and ids == [p.id for p in again] and set(ids) != {p.id for p in other}
    assert all(whole[p.id] == p for p in first)
    with pytest.raises(ConfigError, match=r"subset\.size is 2000, but test has 1319 rows"):
        gsm8k("test", subset={"size": 2000})


def test_texts_are_prompts_in_their_order() -> None:
    config = config_class("data_source", "texts")
    source = config.model_validate({"use": "texts", "texts": ["a", "b"]}).build(CONTEXT)
    assert [(p.id, p.text) for p in (source[0], source[1])] == [("0", "a"), ("1", "b")] and len(source) == 2
    with pytest.raises(ValueError, match="at least 1 item"):
        config.model_validate({"use": "texts", "texts": []})
