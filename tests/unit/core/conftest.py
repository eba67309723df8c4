"""What several tests of the core share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fixtures.services import Service

from miles_core.rewards import endpoint


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A service that scores, on loopback."""
    made = Service()
    yield made
    made.close()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are repeated without a pause."""
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.0)
