"""Conversations as text: a list of messages through a chat template (the tokenizer's own, or one from a file)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import ConfigError, DataError
from ..tokenizers import EOS, PAD
from . import local_path


class Chat(BaseModel):
    """How conversations become text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str | None = None
    """File with a Jinja template; by default the chat template of the model's tokenizer."""
    system: str | None = None
    """System message of conversations that have none."""
    add_generation_prompt: bool = True
    """Whether the text ends with what opens the assistant's turn."""
    variables: dict[str, Any] = {}
    """Further variables of the template, such as ``enable_thinking: false``."""


class Template:
    """Renders conversations. Raises ConfigError when there is no template, or its file cannot be read."""

    def __init__(self, chat: Chat, setting: str, tokenizer: Any) -> None:
        self._chat, self._tokenizer = chat, tokenizer
        self._source = _read(chat.template, setting) if chat.template is not None else None
        if self._source is None and not getattr(tokenizer, "chat_template", None):
            why = "the tokenizer has none" if tokenizer is not None else "no tokenizer is there (one built from these very rows has none)"
            raise ConfigError(
                f"{setting}: prompts are rendered by a chat template, and {why}. Give a Jinja file as {setting}.template, "
                "a model whose tokenizer has one, or leave chat out for rows that are plain text."
            )

    def render(self, messages: list[dict[str, Any]], where: str) -> str:
        """The conversation's text, such that encoding it as a prompt gives the template's tokens.

        A template writes the token that begins a text, and some tokenizers add it to every text too; here it is left out then.

        Raises:
            DataError: The template refuses the conversation, or the tokenizer adds what the template does not write.
        """
        from jinja2 import TemplateError

        if self._chat.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._chat.system}, *messages]
        try:
            text = self._apply(messages)
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError(f"{where}: the chat template cannot render this conversation: {error}") from error
        return text if self._tokenizer is None else self._without_added_tokens(text, where)

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        add, variables = self._chat.add_generation_prompt, self._chat.variables
        if self._tokenizer is not None:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._source, add_generation_prompt=add, tokenize=False, **variables
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        special = {"eos_token": EOS, "pad_token": PAD}  # those of the tokenizer that is about to be built
        given: dict[str, Any] = special | variables
        return render_jinja_template([messages], chat_template=self._source, add_generation_prompt=add, **given)[0][0]

    def _without_added_tokens(self, text: str, where: str) -> str:
        wanted = self._tokenizer.encode(text, add_special_tokens=False)
        if self._tokenizer.encode(text) == wanted:
            return text
        begin = getattr(self._tokenizer, "bos_token", None)
        if begin and text.startswith(begin) and self._tokenizer.encode(text.removeprefix(begin)) == wanted:
            return text.removeprefix(begin)
        raise DataError(
            f"{where}: the tokenizer adds special tokens to a prompt that the chat template does not write; "
            "begin the template with {{ bos_token }}"
        )


def _read(template: str, setting: str) -> str:
    path = local_path(template, f"{setting}.template")
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}.template: {path} cannot be read as text ({error}); give a file with a Jinja template") from error


def conversation(value: list[Any], name: str, where: str) -> list[dict[str, Any]]:
    """A list of messages, checked. Raises DataError naming ``where``, the field, and the message that is none."""
    if not value:
        raise DataError(f"{where}: field {name!r} is an empty conversation; it has at least one message")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: field {name!r}: message {number} is {message!r}; expected a mapping with role and content")
        if not isinstance(message.get("content"), str):
            found = type(message.get("content")).__name__
            raise DataError(f"{where}: field {name!r}: the content of message {number} ({message['role']}) is a {found}; expected text")
    return value
