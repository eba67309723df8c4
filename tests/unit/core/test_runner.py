"""What surrounds a stage in a run; runs as a whole are in tests/e2e."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from miles_core import runner
from miles_core.errors import RunError


class Cycle:
    """As models are whose modules hold functions of their own."""

    def __init__(self) -> None:
        self.itself = self


async def test_what_died_before_a_stage_does_not_live_until_its_end(monkeypatch: pytest.MonkeyPatch):
    """The collector lets alone what is there when a stage begins, and looks at it again when the stage is over, however it ends."""
    seen: list[Any] = []

    async def assemble(*arguments: Any) -> Any:
        return SimpleNamespace(run=run, request_stop=None)

    async def nothing(*arguments: Any) -> None:
        pass

    async def run() -> None:
        seen.append((left(), gc.get_freeze_count() > 1000))
        raise RunError("it failed")

    monkeypatch.setattr(runner, "assemble", assemble)
    monkeypatch.setattr(runner, "start", nothing)
    monkeypatch.setattr(runner, "close", nothing)
    one = object.__new__(runner.Run)
    one.config, one.observer, one._stopping = None, None, False  # ty: ignore[invalid-assignment]
    gc.disable()
    try:
        left = weakref.ref(Cycle())
        with pytest.raises(RunError, match="it failed"):
            await one._stage(None, None, [], None, None, "final")  # ty: ignore[invalid-argument-type]
    finally:
        gc.enable()
    assert seen == [(None, True)]
    assert gc.get_freeze_count() == 0
