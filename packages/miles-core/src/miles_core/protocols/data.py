"""Prompts and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Passage:
    """A piece of a demonstration: its text, who speaks it, and whether SFT trains on it."""

    text: str
    trained: bool
    role: str = "assistant"


@dataclass(frozen=True)
class Prompt:
    """One row of a data source.

    Attributes:
        id: Stable and unique in its source (randomness and ledgers are keyed by it).
        text: What the policy reads first.
        label: What rewards compare with.
        demonstration: What SFT trains on after ``text``, and the better answer of a pair; empty where there is none.
        rejected: The worse answer of a pair (DPO, reward models); empty where there is none.
        metadata: Anything else, JSON-like.
    """

    id: str
    text: str
    label: Any = None
    demonstration: tuple[Passage, ...] = ()
    rejected: tuple[Passage, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Tokenizer(Protocol):
    """Text ↔ token ids; a Hugging Face fast tokenizer is one."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        ...

    def __len__(self) -> int:
        """Vocabulary size, added tokens included."""
        ...


class DataSource(Protocol):
    """Prompts by index. A source is stateless: where a run is in it is the loop's cursor, so that resume is exact."""

    def __len__(self) -> int:
        """Prompts in one epoch. The loop shuffles, with a seed, and starts over at the end.

        Raises DataError when the source is empty.
        """
        ...

    def __getitem__(self, index: int) -> Prompt:
        """The prompt at ``index`` of the unshuffled source. Raises DataError naming file and line of a malformed row."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """A data source that says itself in which order a run goes through it: rows that are not equally near, parts of a mixture.

    Others are gone through in a seeded permutation an epoch.
    """

    def place(self, position: int, seed: int, shuffle: bool) -> tuple[int, int]:
        """Epoch and index of the prompt at ``position`` (from 0, without end), from nothing but these arguments.

        No two positions have the same prompt in the same epoch.
        """
        ...


@runtime_checkable
class NeedsTokenizer(Protocol):
    """A data source whose prompts depend on the model's tokenizer. Where the tokenizer is built from the data itself, prompts are read
    before it is there."""

    def use_tokenizer(self, tokenizer: Tokenizer) -> list[str]:
        """Take the tokenizer of the model that reads the prompts. Returns sentences that a person should know."""
        ...
