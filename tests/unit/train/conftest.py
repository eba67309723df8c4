"""The tiny models of this folder's tests, written once a session."""

from pathlib import Path

import pytest
from fixtures.training import MODELS, write_model


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3 with tied embeddings."""
    return write_model(tmp_path_factory.mktemp("dense"), **MODELS["dense"])


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3-MoE, 4 experts, top-2."""
    return write_model(tmp_path_factory.mktemp("moe"), **MODELS["moe"])
