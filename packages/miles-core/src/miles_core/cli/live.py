"""What a person sees while a run goes on: one line of progress, a short table of the last steps, no wall of logs."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..config import RunConfig
from ..observer import Observer

SHOWN = 8


class JsonView(Observer):
    """One JSON object a step on standard output."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def step(self, row: Mapping[str, Any]) -> None:
        """Print the row."""
        print(json.dumps(row), flush=True)

    def note(self, text: str) -> None:
        """Print a note as an object."""
        print(json.dumps({"note": text}), flush=True)


class LiveView(Observer):
    """Step, reward or loss, held-out accuracy, tokens a second, mismatch and time left; one line a step where there is no terminal."""

    def __init__(self, config: RunConfig, console: Console):
        self.config, self.console = config, console
        self.lines: deque[tuple[int, list[str]]] = deque(maxlen=SHOWN)  # the run's step, and what its line says
        self.total = sum(s.steps for s in config.stages.values())
        self.done = 0
        self.now, self.detail = "start", ""
        self.began = self.stage_began = time.monotonic()
        self.stage_name, self.stage_first, self.stage_steps, self.stage_done = "", 0, 1, 0
        self.accuracy: float | None = None
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.console.is_terminal:
            self.live.__exit__(None, None, None)
            self.console.print(self._table())

    def stage(self, name: str, first_step: int, steps: int) -> None:
        """Start the clock of a stage."""
        self.stage_name, self.stage_first, self.stage_steps, self.stage_done = name, first_step, steps, first_step
        self.stage_began = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"stage {name}: steps {first_step + 1} to {steps}")

    def phase(self, name: str) -> None:
        """Show what is going on."""
        self.now, self.detail = name, ""

    def progress(self, done: int, total: int) -> None:
        """Groups that are ready."""
        self.detail = f" {done}/{total} groups"

    def step(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.done, self.stage_done = row["step"], row["stage_step"]
        accuracies = [v for k, v in row.items() if k.startswith("eval/") and "/avg@" in k]
        self.accuracy = accuracies[0] if accuracies else self.accuracy
        if self.lines and self.lines[-1][0] == row["step"]:
            self.lines.pop()
        self.lines.append((row["step"], [text for _, text in self._cells(row)]))
        if not self.console.is_terminal and (accuracies or row["stage_step"] % max(1, self.stage_steps // 10) == 0):
            self.console.print(" · ".join(f"{name} {text}" for name, text in self._cells(row) if text), soft_wrap=True)

    def note(self, text: str) -> None:
        """Print above the live part."""
        self.console.print(text, soft_wrap=True)

    def _cells(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        def number(key: str, form: str) -> str:
            value = row.get(key)
            return "" if value is None else format(value, form)

        accuracies = [v for k, v in row.items() if k.startswith("eval/") and "/avg@" in k]
        return [
            ("stage", str(row["stage"])),
            ("step", f"{row['stage_step']}/{self.stage_steps}"),
            ("reward", number("reward", ".3f")),
            ("held-out", f"{accuracies[0]:.3f}" if accuracies else ""),
            ("loss", number("loss", ".4f")),
            ("tokens/s", number("tokens_per_second", ",.0f") if row.get("sampled_tokens") else ""),
            ("mismatch", number("mismatch/mean_abs", ".1e")),
            ("s/step", number("seconds", ".2f")),
        ]

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name, _ in self._cells({"stage": "", "stage_step": 0}):
            table.add_column(name, justify="left" if name == "stage" else "right")
        for _, line in self.lines:
            table.add_row(*line)
        return table

    def _render(self) -> Group:
        spent = time.monotonic() - self.stage_began
        fresh = self.stage_done - self.stage_first
        left = spent / fresh * (self.stage_steps - self.stage_done) if fresh > 0 else None
        time_left = f" · stage done in about {left:.0f} s" if left is not None else ""
        status = Text(f"{self.config.name} · {self.stage_name or 'building'} · {self.now}{self.detail}{time_left}", style="dim")
        return Group(self._table(), ProgressBar(total=max(self.total, 1), completed=self.done, width=60), status)
