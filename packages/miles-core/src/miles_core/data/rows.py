"""From rows to prompts: one mapping of fields, the same for every source that reads rows (jsonl, parquet, huggingface)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from string import Formatter
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from ..errors import DataError
from ..plugin_finding import did_you_mean
from ..plugins import PluginConfig
from ..protocols import BuildContext, Passage, Prompt
from ..randomness import shuffled
from .chat import Chat, Template, conversation
from .order import Blocks


class RowOptions(PluginConfig):
    """Which field of a row is what; options of every source that reads rows."""

    prompt_field: str = "prompt"
    """Field with the prompt: a text, or a conversation (a list of messages with ``role`` and ``content``)."""
    label_field: str | None = None
    """Field that rewards compare with; any JSON value but null."""
    demonstration_field: str | None = None
    """Field with the text (or the one assistant message) that SFT trains on, or the better answer of a pair. It may be the prompt
    field itself: then the assistant's message that ends the conversation."""
    rejected_field: str | None = None
    """Field with the worse answer of a pair."""
    id_field: str | None = None
    """Field with a unique id (text or whole number); by default where the row is: its file or split, and its number there."""
    metadata_fields: tuple[str, ...] = ()
    """Fields that samples carry in their metadata, for rewards and whoever looks."""
    template: str = "{prompt}"
    """The prompt's text: a Python format string over the row's fields; ``{prompt}`` is the prompt field. Not for conversations."""
    chat: Chat | None = None
    """How conversations become text; with it, a prompt that is a text is a conversation of one user message."""
    max_prompt_tokens: int | None = Field(None, gt=0)
    """Longest prompt, in tokens. All rows are tokenised once, before the run begins. A prompt is never cut."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What happens to longer prompts: refuse: the run does not start. drop: they are left out, and their number is said."""
    limit: int | None = Field(None, gt=0)
    """Only the first so many rows."""

    @field_validator("template")
    @classmethod
    def _template_can_be_filled(cls, template: str) -> str:
        if any(name is not None and (name == "" or name[0].isdigit()) for _, name, _, _ in Formatter().parse(template)):
            raise ValueError("a template names its fields: {prompt}, not {} or {0}; a literal brace is doubled")
        return template

    @field_validator("metadata_fields")
    @classmethod
    def _metadata_is_free(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if "response" in names:
            raise ValueError("metadata 'response' is what the policy wrote; rename that field of the data")
        return names

    @model_validator(mode="after")
    def _dropping_has_a_bound(self) -> Self:
        if self.too_long == "drop" and self.max_prompt_tokens is None:
            raise ValueError("too_long: drop needs max_prompt_tokens: which prompts are too long?")
        return self

    def fields(self) -> list[str]:
        """The fields that are read."""
        named = [self.prompt_field, self.label_field, self.demonstration_field, self.rejected_field, self.id_field]
        in_template = [name.split(".")[0].split("[")[0] for _, name, _, _ in Formatter().parse(self.template) if name]
        wanted = [*named, *self.metadata_fields, *(name for name in in_template if name != "prompt")]
        return list(dict.fromkeys(name for name in wanted if name is not None))


class Rows(Protocol):
    """Rows by index."""

    blocks: Blocks | None
    """How they lie, where some are nearer to each other than others."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row. Raises DataError, saying where, when it cannot be read."""
        ...

    def where(self, index: int) -> str:
        """Where a row is, for errors."""
        ...

    def name(self, index: int) -> str:
        """A unique name of a row that does not depend on the machine."""
        ...

    def column(self, name: str) -> Iterator[Any]:
        """One field of all rows, in their order; None where it is missing."""
        ...


class RowSource:
    """Prompts made of rows when they are asked for.

    Attributes:
        config: What is what.
        rows: The rows.
    """

    def __init__(self, config: RowOptions, context: BuildContext, rows: Rows) -> None:
        self.config, self.rows = config, rows
        self._chat: Template | None = None
        self._tokenizer: Any = None
        self._kept: np.ndarray | None = None
        self._blocks = rows.blocks
        if config.id_field is not None:
            self._check_ids(config.id_field)
        if context.tokenizer is not None:
            self.use_tokenizer(context.tokenizer)

    def use_tokenizer(self, tokenizer: Any) -> list[str]:
        """Render and measure prompts with the model's tokenizer from now on.

        Returns:
            What a person should know: how many prompts were left out.

        Raises:
            ConfigError: Conversations need a chat template and there is none.
            DataError: A prompt has more than ``max_prompt_tokens`` tokens and is not to be dropped, or all have.
        """
        self._tokenizer = tokenizer
        self._chat = self._template()
        if self.config.max_prompt_tokens is None:
            return []
        return self._measure(self.config.max_prompt_tokens)

    def __len__(self) -> int:
        return len(self.rows) if self._kept is None else len(self._kept)

    def place(self, position: int, seed: int, shuffle: bool) -> tuple[int, int]:
        """Epoch and index of the prompt at ``position``: rows that lie in blocks are shuffled as ``order.Blocks`` says."""
        epoch, index = divmod(position, len(self))
        if not shuffle:
            return epoch, index
        if self._blocks is None:
            return epoch, shuffled(index, len(self), seed, "epoch", epoch)
        return epoch, self._blocks.index(index, seed, "epoch", epoch)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row. Raises DataError saying where the row is."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} rows")
        return self._prompt(index if self._kept is None else int(self._kept[index]))

    def _prompt(self, index: int) -> Prompt:
        row, where, config = self.rows[index], self.rows.where(index), self.config
        text, ending = self._text(row, where)
        itself = config.demonstration_field == config.prompt_field
        return Prompt(
            id=self.rows.name(index) if config.id_field is None else _id(row.get(config.id_field), config.id_field, where),
            text=text,
            label=None if config.label_field is None else _jsonlike(field(row, config.label_field, where), config.label_field, where),
            demonstration=ending if itself else _answer(row, config.demonstration_field, where),
            rejected=_answer(row, config.rejected_field, where),
            metadata={name: _jsonlike(row.get(name), name, where) for name in config.metadata_fields if _has(row, name, where)},
        )

    def _text(self, row: dict[str, Any], where: str) -> tuple[str, tuple[Passage, ...]]:
        """The prompt's text, and the message that ends the conversation if that is the demonstration."""
        config, ending = self.config, ()
        value = field(row, config.prompt_field, where)
        if isinstance(value, list):
            if config.chat is None:
                raise DataError(f"{where}: field {config.prompt_field!r} is a conversation; add chat: {{}} to render it by a chat template")
            if config.template != "{prompt}":
                raise DataError(f"{where}: field {config.prompt_field!r} is a conversation, which fills no template; leave template out")
            messages = conversation(value, config.prompt_field, where)
            if config.demonstration_field == config.prompt_field:
                messages, ending = messages[:-1], (_message(messages[-1], config.prompt_field, where),)
            if not messages or messages[-1]["role"] == "assistant":
                raise DataError(
                    f"{where}: field {config.prompt_field!r} leaves nothing to answer: it ends with the assistant's message. "
                    f"Take that out, or learn from it: demonstration_field: {config.prompt_field}"
                )
        elif config.demonstration_field == config.prompt_field:
            raise DataError(
                f"{where}: demonstration_field is the prompt field, so {config.prompt_field!r} must be a conversation, not text"
            )
        else:
            text = _filled(config.template, row, text_field(row, config.prompt_field, where), where)
            if config.chat is None:
                return text, ()
            messages = [{"role": "user", "content": text}]
        if self._chat is None:
            self._chat = self._template()
        assert self._chat is not None
        return self._chat.render(messages, where), ending

    def _template(self) -> Template | None:
        setting = f"data_source {self.config.use}: chat"
        return None if self.config.chat is None else Template(self.config.chat, setting, self._tokenizer)

    def _measure(self, limit: int) -> list[str]:
        self._kept, kept = None, []
        self._blocks = self.rows.blocks
        for index in range(len(self.rows)):
            prompt = self._prompt(index)
            tokens = len(self._tokenizer.encode(prompt.text))
            if tokens <= limit:
                kept.append(index)
            elif self.config.too_long == "refuse":
                raise DataError(
                    f"{self.rows.where(index)}: the prompt has {tokens} tokens, more than max_prompt_tokens {limit}. "
                    "Raise it, take the row out, or leave such prompts out with too_long: drop"
                )
        count, dropped = len(self.rows), len(self.rows) - len(kept)
        if not kept:
            raise DataError(f"data_source {self.config.use}: all {count} prompts have more than max_prompt_tokens {limit} tokens; raise it")
        if not dropped:
            return []
        self._kept = np.array(kept, np.int64)
        self._blocks = self._blocks and self._blocks.only(self._kept)
        return [f"data_source {self.config.use}: {dropped} of {count} prompts have more than {limit} tokens and are left out."]

    def _check_ids(self, name: str) -> None:
        """Randomness and ledgers are keyed by the id: two rows with the same one would be taken for one."""
        seen: dict[str, int] = {}
        for index, value in enumerate(self.rows.column(name)):
            own = _id(value, name, self.rows.where(index))
            if seen.setdefault(own, index) != index:
                raise DataError(f"{self.rows.where(index)}: id {own!r} is also that of {self.rows.where(seen[own])}; ids must be unique")


def check_columns(wanted: list[str], there: list[str], where: str) -> None:
    """Raise a DataError that names the columns that are there unless all that are wanted are among them."""
    for name in wanted:
        if name not in there:
            raise DataError(f"{where} has no column {name!r}.{did_you_mean(name, there)} It has: {', '.join(there) or 'none'}")


def field(row: dict[str, Any], name: str, where: str) -> Any:
    """A field that must be there. Raises DataError naming ``where``, the field and those the row has."""
    if row.get(name) is None:
        found = "null" if name in row else f"missing.{did_you_mean(name, list(row))} The row has: {', '.join(row) or 'nothing'}"
        raise DataError(f"{where}: field {name!r} is {found}")
    return row[name]


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A field that must be a text with something in it. Raises DataError naming ``where``, the field and what was found."""
    value = field(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: field {name!r} is a {type(value).__name__}; expected text")
    if not value.strip():
        raise DataError(f"{where}: field {name!r} is empty; fill it or take the row out")
    return value


def _filled(template: str, row: dict[str, Any], prompt: str, where: str) -> str:
    try:
        return template.format_map({**row, "prompt": prompt})
    except KeyError as error:
        raise DataError(f"{where}: the template names {error}, which is missing. The row has: {', '.join(row)}") from None
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise DataError(f"{where}: the template {template!r} cannot be filled: {error}") from None


def _answer(row: dict[str, Any], name: str | None, where: str) -> tuple[Passage, ...]:
    if name is None:
        return ()
    value = row.get(name)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return (_message(conversation(value, name, where)[0], name, where),)
    return (Passage(text_field(row, name, where), trained=True),)


def _message(message: dict[str, Any], name: str, where: str) -> Passage:
    """A message of the assistant, to learn from."""
    if message["role"] != "assistant" or not message["content"].strip():
        found = f"{message['role']}: {message['content'][:40]!r}"
        raise DataError(f"{where}: field {name!r} must end with what the assistant says, to learn from; found {found}")
    return Passage(message["content"], trained=True)


def _id(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = "missing" if value is None else repr(value)
        raise DataError(f"{where}: field {name!r} is {found}; an id is text or a whole number")
    return str(value)


def _has(row: dict[str, Any], name: str, where: str) -> bool:
    if name not in row:
        field(row, name, where)
    return row[name] is not None


def _jsonlike(value: Any, name: str, where: str) -> Any:
    """Labels and metadata are kept with samples, in JSON."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: field {name!r} holds a {type(value).__name__}, which JSON has not; turn it into text or a number"
        ) from None
    return value
