"""Who watches a run: the live view of the command line, or nothing. Called by the loop, never calls back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Observer:
    """Watches nothing. A live view overrides what it shows."""

    def stage(self, name: str, first_step: int, steps: int) -> None:
        """A stage begins (or goes on) at ``first_step`` of ``steps``."""

    def phase(self, name: str) -> None:
        """The loop now does this: rollout, train, publish, evaluate, save, build."""

    def progress(self, done: int, total: int) -> None:
        """Within the rollout phase: groups that are ready, of those the step takes."""

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done; ``row`` is what ``metrics.jsonl`` got."""

    def note(self, text: str) -> None:
        """Something a person should know."""
