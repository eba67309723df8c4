"""``miles compare``: what the command prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..inspection.compare import Point, RunMetrics, chosen_metrics, differences, draw, labels
from ..inspection.plain import finite
from ..run_dir import RunDir
from .screen import console, print_wide


def compare(directories: Sequence[Path], metrics: str | None, at: str | None, plot: Path | None, as_json: bool) -> None:
    """Tables, or one JSON object; a plot if a file is named. Raises ConfigError."""
    runs = [RunMetrics.read(RunDir.open(path)) for path in directories]
    chosen = chosen_metrics(runs, [m.strip() for m in metrics.split(",")] if metrics else [])
    steps = _steps(at)
    if plot is not None:
        if not chosen:
            raise ConfigError("there is nothing to plot: none of the runs has metrics yet")
        if not find_spec("matplotlib"):
            raise ConfigError("a plot needs matplotlib: pip install 'miles-core[report]'")
        draw(runs, chosen, plot)
    if as_json:
        print(json.dumps(finite(_for_machines(runs, chosen, steps)), indent=1, allow_nan=False))
        return
    print_wide(_metrics(runs, chosen, steps))
    differing = differences(runs)
    if len(runs) > 1:
        if differing:
            print_wide(_configs(runs, differing))
        else:
            console.print("The configurations are alike.")
    if plot is not None:
        console.print(f"Plot: {escape(str(plot))}", soft_wrap=True)


def _steps(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--at {text!r}: expected steps, such as 10,20") from None


def _metrics(runs: Sequence[RunMetrics], chosen: Sequence[str], steps: Sequence[int]) -> Table:
    table = Table("metric", box=None, pad_edge=False)
    for label in labels(runs):
        table.add_column(escape(label), justify="right")
    table.add_row("[dim]steps[/]", *[str(run.steps) for run in runs])
    for name in chosen:
        table.add_row(Text(name, style="bold"))
        table.add_row("  final", *[_point(run.final(name)) for run in runs])
        if any(run.best(name) for run in runs):
            table.add_row("  best", *[_point(run.best(name)) for run in runs])
        for step in steps:
            values = [run.at(name, step) for run in runs]
            table.add_row(f"  at {step}", *["–" if v is None else f"{v:.4g}" for v in values])
    return table


def _configs(runs: Sequence[RunMetrics], differing: dict[str, list]) -> Table:
    table = Table("only these keys differ", *map(escape, labels(runs)), box=None, pad_edge=False)
    for key, values in differing.items():
        table.add_row(Text(key, style="bold"), *[Text(str(v)) for v in values])
    return table


def _for_machines(runs: Sequence[RunMetrics], chosen: Sequence[str], steps: Sequence[int]) -> dict:
    def told(run: RunMetrics, name: str) -> dict:
        final, best = run.final(name), run.best(name)
        points = {"final": final, "best": best}
        said = {k: p and {"step": p[0], "value": p[1]} for k, p in points.items()}
        return said | {"at": {s: run.at(name, s) for s in steps}}

    of_runs = [{"run": str(run.path), "steps": run.steps, "metrics": {n: told(run, n) for n in chosen}} for run in runs]
    return {"runs": of_runs, "differences": differences(runs)}


def _point(point: Point | None) -> str:
    return "–" if point is None else f"{point[1]:.4g} (step {point[0]})"
