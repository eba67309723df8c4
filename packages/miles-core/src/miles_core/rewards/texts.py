"""What rewards read of a sample as text: its response, and the references that its label gives."""

from __future__ import annotations

import json
from typing import Any

from ..errors import DataError
from ..protocols import BuildContext
from ..sample import Sample


def end_of_text(context: BuildContext) -> str:
    """The text of the policy's end-of-text token; "" where there is no tokenizer or no such token."""
    tokenizer = context.tokenizer
    return "" if tokenizer is None or tokenizer.eos_token_id is None else tokenizer.decode([tokenizer.eos_token_id])


def response_of(sample: Sample, end: str, reward: str) -> str:
    """``metadata["response"]``, everything after the prompt, without the end of text at its very end.

    Args:
        sample: Whose.
        end: See ``end_of_text``.
        reward: Who reads, for the message.

    Raises:
        DataError: The sample has no response.
    """
    response = sample.metadata.get("response")
    if not isinstance(response, str):
        raise DataError(f"sample {sample.id}: metadata['response'] is {response!r}; reward {reward} needs the response's text there")
    return response.removesuffix(end)


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
