"""The tiny models of this folder's tests, written once a session, and Megatron trainers over them."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from fixtures.megatron import megatron_trainer
from fixtures.training import MODELS, started, write_model


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3 with tied embeddings."""
    return write_model(tmp_path_factory.mktemp("dense"), **MODELS["dense"])


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3-MoE, 4 experts, top-2."""
    return write_model(tmp_path_factory.mktemp("moe"), **MODELS["moe"])


@pytest_asyncio.fixture
async def start(cluster: Any, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts trainers, and closes them."""
    async with started(lambda path, **options: megatron_trainer(path, tmp_path, cluster, **options)) as start:
        yield start
