"""Shortened quick starts in processes of their own, and the one that nothing disturbs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.kills import Warm, start


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """``miles`` with its imports behind it."""
    with Warm() as warm:
        yield warm


@pytest.fixture(scope="session")
def undisturbed(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody kills."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert start(warm, directory) == 0, (directory / "out.txt").read_text()
    return directory / "runs" / "run"
