"""docs/data.md: each of its examples is read as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
import yaml

from miles_core import plugin_finding
from miles_core.cursor import Cursor
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext
from miles_core.tokenizers import TokenizerConfig, build_tokenizer

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
FIRST = [
    ("sums.jsonl:1", "0 + 0 = ?", "0", {"level": 0}),
    ("train-0.parquet:0", "0 + 0", "0", {}),
    ("rows:0", "<|user|>What is 0 + 0?\n<|assistant|>", "0", {}),
    ("rows:0", "system: Answer with a number.\nuser: What is 0 + 0?\nno thinking", "0", {}),
    ("train-0.parquet:0", "0 + 0", None, {}),
    ("sums/train-0.parquet:0", "0 + 0", "0", {"source": "sums"}),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page's script writes."""
    directory = tmp_path_factory.mktemp("docs")
    [script] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        exec(script, {})
    return directory


@pytest.mark.parametrize(("example", "first"), list(zip(EXAMPLES, FIRST, strict=True)))
def test_an_example_is_read_as_it_stands(written: Path, monkeypatch: pytest.MonkeyPatch, example: str, first: tuple) -> None:
    monkeypatch.chdir(written)
    tokenizer = build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), ["text"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'thinking' if enable_thinking else 'no thinking' }}"
    )
    options = yaml.safe_load(example)["data"]
    source = (
        config_class("data_source", options["use"]).model_validate(options).build(BuildContext(written, "docs", 0, tokenizer=tokenizer))
    )
    prompt = source[0]
    assert (prompt.id, prompt.text, prompt.label, prompt.metadata) == first
    cursor = Cursor(source, 0, True)
    assert len({(cursor.epoch(p), cursor.prompt(p).id) for p in range(200)}) == 200


def test_every_source_of_the_page_is_one_that_comes_with_miles() -> None:
    named = re.findall(r"^\| `([^|]*)` \|", PAGE, re.MULTILINE)
    assert {name.strip("` ") for cell in named for name in cell.split(",")} == set(plugin_finding.find_all("data_source"))
