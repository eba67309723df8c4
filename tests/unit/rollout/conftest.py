"""A tiny model with a word tokenizer, and engines over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from miles_core.plugins import config_class
from miles_core.protocols import BuildContext
from miles_core.tokenizers import TokenizerConfig, build_tokenizer

WORDS = ("<res>", "</res>", *"abcdefghij", " ", "ab", "stop here", "é")


@dataclass(frozen=True)
class Tiny:
    """A model directory and its tokenizer."""

    path: Path
    tokenizer: Any

    def context(self, **changes: Any) -> BuildContext:
        return replace(BuildContext(self.path, "test", 0, model_path=self.path, tokenizer=self.tokenizer), **changes)

    def engine(self, context: BuildContext | None = None, **options: Any) -> Any:
        """Built as a recipe does."""
        config = config_class("rollout_engine", "local").model_validate({"use": "local", **options})
        return config.build(context or self.context())


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny model of any type with seeded weights."""

    def save(model_type: str, **fields: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(11)
        path = tmp_path_factory.mktemp(model_type)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def tiny(save_model: Callable[..., Path]) -> Tiny:
    """Qwen3, 2 layers, tied embeddings, 128 positions."""
    tokenizer = build_tokenizer(TokenizerConfig(kind="words", words=WORDS), [])
    path = save_model(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Tiny(path, tokenizer)
