"""Conversations become the very tokens of the chat template, and prompts that are too long are refused or counted, never cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from miles_core.assembly import texts_of
from miles_core.data.jsonl import JsonlSource
from miles_core.errors import ConfigError, DataError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, NeedsTokenizer
from miles_core.tokenizers import TokenizerConfig, build_tokenizer

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think is defined %}[think={{ think }}]{% endif %}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "Sure?"}]


def make_tokenizer(template: str | None, *, adds_bos: bool = False) -> Any:
    """A byte-level tokenizer; with ``adds_bos`` every text begins with ``<bos>`` unless it is told to add nothing (as Llama's)."""
    tokenizer = build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300, special_tokens=("<|user|>", "<bos>")), ["some text"])
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.bos_token = "<bos>"
        bos = tokenizer.convert_tokens_to_ids("<bos>")
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return tokenizer


@pytest.fixture
def rows(tmp_path: Path):
    def source(lines: list[dict], tokenizer: Any = None, **options) -> JsonlSource:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = config_class("data_source", "jsonl").model_validate({"use": "jsonl", "path": str(tmp_path / "rows.jsonl"), **options})
        return config.build(BuildContext(run_dir=tmp_path, run="test", seed=0, tokenizer=tokenizer))

    return source


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_prompt_is_the_tokens_of_the_template(rows, adds_bos: bool) -> None:
    """Against transformers: encoding the prompt as rollouts do gives what ``apply_chat_template`` tokenises, with one ``<bos>``."""
    tokenizer = make_tokenizer(("{{ bos_token }}" if adds_bos else "") + CHATML, adds_bos=adds_bos)
    [prompt] = rows([{"prompt": MESSAGES}], tokenizer, chat={})
    wanted = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(prompt.text) == wanted
    assert tokenizer.decode(wanted).endswith("<|user|>Sure?<eos><|assistant|>")


def test_a_template_that_lacks_what_the_tokenizer_adds_is_refused(rows) -> None:
    source = rows([{"prompt": MESSAGES}], make_tokenizer(CHATML, adds_bos=True), chat={})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the tokenizer adds special tokens .* begin the template with \{\{ bos_token \}\}"):
        source[0]


def test_system_variables_and_texts(rows, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML.replace("<|", "[").replace("|>", "]"))
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Hi"}]
    lines = [{"prompt": "Hi", "n": 1}, {"prompt": [own[1]]}, {"prompt": own}]
    source = rows(lines, make_tokenizer(CHATML), chat={"system": "Be brief."})
    assert [p.text for p in source] == [
        "<|system|>Be brief.<eos><|user|>Hi<eos><|assistant|>",
        "<|system|>Be brief.<eos><|user|>Hi<eos><|assistant|>",
        "<|system|>Own.<eos><|user|>Hi<eos><|assistant|>",
    ]
    options = {"template": str(tmp_path / "chat.jinja"), "variables": {"think": False}}
    assert rows(lines, make_tokenizer(None), chat=options)[1].text == "[user]Hi<eos>[assistant][think=False]"
    options = {"add_generation_prompt": False}
    assert rows(lines, make_tokenizer(CHATML), chat=options, template="{prompt} {n}")[0].text == "<|user|>Hi 1<eos>"


def test_what_the_assistant_says_last_can_be_learned_from(rows) -> None:
    lines = [{"prompt": MESSAGES[:2], "better": [MESSAGES[1]], "worse": "3"}]
    [prompt] = rows(lines, make_tokenizer(CHATML), chat={}, demonstration_field="prompt")
    assert (prompt.text, [p.text for p in prompt.demonstration]) == ("<|user|>What is 1 + 1?<eos><|assistant|>", ["2"])
    [pair] = rows(
        [{**lines[0], "prompt": MESSAGES[:1]}], make_tokenizer(CHATML), chat={}, demonstration_field="better", rejected_field="worse"
    )
    assert [(p.text, p.trained) for p in (*pair.demonstration, *pair.rejected)] == [("2", True), ("3", True)]


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        (MESSAGES, {"chat": None}, "is a conversation; add chat: {}"),
        (MESSAGES, {"template": "Q: {prompt}"}, "is a conversation, which fills no template"),
        ([], {}, "is an empty conversation"),
        (["Hi"], {}, "message 1 is 'Hi'; expected a mapping with role and content"),
        ([{"content": "Hi"}], {}, "message 1 is {'content': 'Hi'}; expected a mapping"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "the content of message 1 (user) is a list; expected text"),
        ([{"role": "user", "content": None}], {}, "the content of message 1 (user) is a NoneType"),
        (MESSAGES[:2], {}, "leaves nothing to answer: it ends with the assistant's message"),
        (MESSAGES[:1], {"demonstration_field": "prompt"}, "must end with what the assistant says, to learn from; found user"),
        (MESSAGES[1:2], {"demonstration_field": "prompt"}, "leaves nothing to answer"),
        ("Hi", {"demonstration_field": "prompt"}, "must be a conversation, not text"),
        ([{"role": "tool", "content": "Hi"}], {}, "the chat template cannot render this conversation: no tools here"),
        (7, {}, "'prompt' is a int; expected text"),
    ],
)
def test_a_malformed_conversation_names_file_and_line(rows, prompt: Any, options: dict, expected: str) -> None:
    strict = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endfor %}" + CHATML
    source = rows([{"prompt": prompt}], make_tokenizer(strict), **({"chat": {}} | options))
    with pytest.raises(DataError, match=re.escape(expected)) as error:
        source[0]
    assert "rows.jsonl:1" in str(error.value)


def test_no_chat_template_is_a_sentence(rows, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"rendered by a chat template, and the tokenizer has none\. Give a Jinja file as .*chat\.template"
    ):
        rows([{"prompt": "Hi"}], make_tokenizer(None), chat={})
    without = rows([{"prompt": "Hi"}], chat={})
    with pytest.raises(ConfigError, match="no tokenizer is there"):
        without[0]
    with pytest.raises(ConfigError, match=r"chat\.template: .*none\.jinja cannot be read as text"):
        rows([{"prompt": "Hi"}], make_tokenizer(None), chat={"template": str(tmp_path / "none.jinja")})


def test_a_tokenizer_can_be_built_from_rendered_conversations(rows, tmp_path: Path) -> None:
    """Before there is a tokenizer, a template from a file gives the text that the tokenizer is built for, and the same one after."""
    (tmp_path / "chat.jinja").write_text(CHATML)
    source = rows([{"prompt": MESSAGES}], chat={"template": str(tmp_path / "chat.jinja")})
    [text] = texts_of(source)
    assert text.endswith("<|user|>Sure?<eos><|assistant|>")
    assert isinstance(source, NeedsTokenizer)
    tokenizer = build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300, special_tokens=("<|user|>", "<|assistant|>")), [text])
    assert source.use_tokenizer(tokenizer) == []
    assert source[0].text == text


# ---- too long -------------------------------------------------------------------------------------------------------


def test_prompts_that_are_too_long_are_refused_or_counted(rows) -> None:
    tokenizer = make_tokenizer(CHATML)
    lines = [{"prompt": "x y z " * n, "n": n} for n in (1, 9, 2, 30, 3)]
    lengths = [len(tokenizer.encode(line["prompt"])) for line in lines]
    limit = sorted(lengths)[2]
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: the prompt has {lengths[1]} tokens, more than max_prompt_tokens {limit}"):
        rows(lines, tokenizer, max_prompt_tokens=limit)
    source = rows(lines, max_prompt_tokens=limit, too_long="drop", label_field="n")
    assert len(source) == 5  # nobody knows yet
    [said] = source.use_tokenizer(tokenizer)
    assert re.search(rf"2 of 5 prompts have more than {limit} tokens and are left out", said)
    assert [p.label for p in source] == [1, 2, 3] and [p.id for p in source] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:5"]
    assert rows(lines, max_prompt_tokens=max(lengths), too_long="drop").use_tokenizer(tokenizer) == []
    with pytest.raises(DataError, match="all 5 prompts have more than max_prompt_tokens 1"):
        rows(lines, tokenizer, max_prompt_tokens=1, too_long="drop")
    with pytest.raises(ValueError, match="too_long: drop needs max_prompt_tokens"):
        rows(lines, too_long="drop")


def test_the_length_is_that_of_the_rendered_prompt(rows) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML, adds_bos=True)
    tokens = len(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False))
    assert len(rows([{"prompt": MESSAGES}], tokenizer, chat={}, max_prompt_tokens=tokens)) == 1
    with pytest.raises(DataError, match=f"the prompt has {tokens} tokens, more than max_prompt_tokens {tokens - 1}"):
        rows([{"prompt": MESSAGES}], tokenizer, chat={}, max_prompt_tokens=tokens - 1)
