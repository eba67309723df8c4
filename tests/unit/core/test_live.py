"""The live view: each line says what was true of its own step."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from miles_core.cli.live import LiveView
from miles_core.config import resolve


def test_a_line_keeps_the_length_of_its_own_stage() -> None:
    printed = StringIO()
    console = Console(file=printed, force_terminal=True, width=120, color_system=None)
    with LiveView(resolve("quickstart"), console) as view:
        view.stage("sft", 0, 500)
        view.step({"step": 500, "stage": "sft", "stage_step": 500, "loss": 1.0, "seconds": 0.1})
        view.stage("rl", 0, 40)
        view.step({"step": 501, "stage": "rl", "stage_step": 1, "reward": 0.5, "loss": 0.1, "seconds": 0.1})
    last = printed.getvalue().split("stage ")[-1]
    assert "500/500" in last and "1/40" in last and "500/40" not in last
