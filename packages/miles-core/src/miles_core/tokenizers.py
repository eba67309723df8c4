"""Tokenizers of models built from scratch, and loading the tokenizer that lies beside a model.

Both kinds are exact: decoding gives the encoded text back, byte for byte. They add nothing at the ends, and texts may be
encoded apart and joined wherever a word, a special token or a digit begins or ends: ``encode(a) + encode(b) == encode(a + b)``.
Environments rely on that for what they inject.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from .errors import ConfigError, DataError
from .model_files import check_vocabulary, json_object, sentences

if TYPE_CHECKING:  # the extra miles-core[data]
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
BYTES = 256
SAMPLE = 1000
"""So many texts stand for all when words are checked: a source may make millions."""
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)
"""Patterns of the files that an export takes over from the model it was started from."""

# Contractions, words with the space before them, single digits, runs of signs, single line ends, other white space.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+(?!\S)|[^\S\n]+"


class TokenizerConfig(BaseModel):
    """The tokenizer of a model built from scratch. ``<pad>`` and ``<eos>`` are added to either kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["words", "bpe"]
    """words: a closed vocabulary. bpe: byte-level byte pair encoding, trained on the data; any text can be encoded."""
    words: tuple[str, ...] = ()
    """words: the exact texts that are tokens, spaces included (``" + "``); where several fit, the longest is taken."""
    vocab_size: int = 4096
    """bpe: number of tokens, everything included."""
    special_tokens: tuple[str, ...] = ()
    """bpe: texts that are one token wherever they stand, such as ``<<``. Digits always are tokens of their own."""

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Self:
        listed = self.words if self.kind == "words" else self.special_tokens
        unused = {"vocab_size", "special_tokens"} if self.kind == "words" else {"words"}
        if set_in_vain := sorted(n for n in unused if getattr(self, n) != type(self).model_fields[n].default):
            raise ValueError(f"a tokenizer of kind {self.kind!r} has no {' and no '.join(set_in_vain)}; leave that out")
        if self.kind == "words" and not self.words:
            raise ValueError("a tokenizer of kind 'words' needs its list of words")
        if len({PAD, EOS, "", *listed}) < len(listed) + 3:
            raise ValueError(f"a token is listed twice, is empty, or is {PAD} or {EOS}, which are always there")
        least = BYTES + 2 + len(self.special_tokens)
        if self.kind == "bpe" and self.vocab_size < least:
            raise ValueError(f"vocab_size {self.vocab_size} is too small: bytes, {PAD}, {EOS} and special tokens alone are {least}")
        return self


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer from its configuration.

    Args:
        config: Which.
        texts: What it is for: bpe is trained on all of them; words must be able to write them (the first thousand are checked).

    Raises:
        DataError: A text holds what none of the words can write, or there is no text to train bpe on.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = _words(config, texts) if config.kind == "words" else _bpe(config, texts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face directory. Raises ConfigError when there is none, or it is not that of the model beside it."""
    described = path / "tokenizer_config.json"
    if not described.is_file():
        raise ConfigError(f"{path} holds no tokenizer (no {described.name}); give the directory of a model with its tokenizer files")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if json_object(described).get("tokenizer_class") == PreTrainedTokenizerFast.__name__:
        # tokenizer.json is all of it. AutoTokenizer would add tokens of its own for some model types (qwen2, transformers 5.19).
        kind = PreTrainedTokenizerFast
    else:
        kind = AutoTokenizer
    with sentences(path):
        tokenizer = kind.from_pretrained(path)
    _check_vocabulary(tokenizer, path)  # ty: ignore[invalid-argument-type]
    return tokenizer  # ty: ignore[invalid-explicit-return]


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """The tokenizer writes texts, with ids that the model beside it has."""
    added = set(tokenizer.added_tokens_decoder) - {tokenizer.eos_token_id}
    written = {token: id for token, id in tokenizer.get_vocab().items() if id not in added}
    if not written:
        raise ConfigError(f"the tokenizer in {path} has no tokens but added ones: it cannot write a text. Put the model's own there.")
    check_vocabulary(path, written)


def _words(config: TokenizerConfig, texts: Iterable[str]):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    longest_first = "|".join(re.escape(w) for w in sorted((*config.words, EOS, PAD), key=len, reverse=True))
    for text in islice(texts, SAMPLE):
        if rest := [between for between in re.split(longest_first, text) if between]:
            raise DataError(f"no word of the tokenizer writes {rest[0]!r} in {text!r}; add it to the tokenizer's words")
    vocabulary = {word: i for i, word in enumerate((PAD, EOS, *config.words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=""))  # no word for the unknown: encoding it is an error
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bpe(config: TokenizerConfig, texts: Iterable[str]):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(set(config.special_tokens) - set(alphabet)),  # "=" is a byte's token already
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_between(config.special_tokens, texts), trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in config.special_tokens])
    return tokenizer


def _between(special_tokens: tuple[str, ...], texts: Iterable[str]) -> Iterator[str]:
    """What bpe is trained on: the texts without the special tokens, cut where they stood."""
    some = False
    for text in texts:
        some = True
        yield from re.split("|".join(map(re.escape, special_tokens)), text) if special_tokens else (text,)
    if not some:
        raise DataError("a bpe tokenizer is trained on the data's texts, and there are none")
