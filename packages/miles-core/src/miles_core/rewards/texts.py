"""What rewards read of a sample as text: its response, and the references that its label gives."""

from __future__ import annotations

import json
from typing import Any

from .. import model_files
from ..errors import DataError
from ..protocols import BuildContext
from ..sample import Sample


def ends_of_text(context: BuildContext) -> tuple[str, ...]:
    """The texts of the tokens that end what the policy writes, the longest first; empty where there is no tokenizer or no such token."""
    tokenizer = context.tokenizer
    if tokenizer is None:
        return ()
    own = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
    ids = own if context.model_path is None else model_files.ends_of_text(context.model_path, tokenizer)
    return tuple(sorted({text for id in ids if (text := tokenizer.decode([id]))}, key=lambda text: (-len(text), text)))


def response_of(sample: Sample, ends: tuple[str, ...], reward: str) -> str:
    """``metadata["response"]``, everything after the prompt, without the one end of text at its very end.

    Args:
        sample: Whose.
        ends: See ``ends_of_text``.
        reward: Who reads, for the message.

    Raises:
        DataError: The sample has no response.
    """
    response = sample.metadata.get("response")
    if not isinstance(response, str):
        raise DataError(f"sample {sample.id}: metadata['response'] is {response!r}; reward {reward} needs the response's text there")
    return next((response.removesuffix(end) for end in ends if response.endswith(end)), response)


def references_of(sample: Sample, reward: str) -> list[str]:
    """The texts that a response is compared with: the label, a text or number, or each of a list of these.

    Raises:
        DataError: The label is missing or something else.
    """
    labels = sample.label if isinstance(sample.label, list | tuple) else [sample.label]
    if not labels or any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in labels):
        raise DataError(
            f"sample {sample.id}: label is {sample.label!r}; reward {reward} compares with a text or a number, or a list of these"
        )
    return [str(one) for one in labels]


def as_text(value: Any) -> str:
    """A prompt or label inside other text: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
