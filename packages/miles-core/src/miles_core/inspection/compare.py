"""``miles compare RUN RUN …``: metrics side by side, and what the configurations do not have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..plugin_finding import did_you_mean
from ..run_dir import RunDir
from .tokens import run_config

LOWER_IS_BETTER = ("loss", "mismatch", "seconds", "time/", "truncated", "dropped_groups")
HIGHER_IS_BETTER = re.compile(r"reward|tokens_per_second|eval/[^/]+/(?:reward|(?:avg|pass)@\d+)")
SHOWN = (
    "reward",
    "eval/",
    "loss",
    "length/sampled",
    "truncated",
    "entropy",
    "kl",
    "grad_norm",
    "mismatch/mean_abs",
    "seconds",
    "tokens_per_second",
)
"""Metrics that are compared unless others are named, those of them that a run has; a name with a slash at its end stands for all below."""
ASIDE = ("name", "runs_dir")
Point = tuple[int, float]


@dataclass(frozen=True)
class RunMetrics:
    """The numbers of one run.

    Attributes:
        path: Its directory.
        config: Its configuration, flat: ``stages.rl.steps`` → 40.
        series: (step, value) of each metric, in order; a step that was logged twice counts with what came last.
        steps: The last step with metrics; 0 if there is none.
    """

    path: Path
    config: dict[str, Any]
    series: dict[str, list[Point]] = field(default_factory=dict)
    steps: int = 0

    @staticmethod
    def read(run: RunDir) -> RunMetrics:
        """From ``config.yaml`` and ``metrics.jsonl``. Raises ConfigError if they cannot be read."""
        by_step: dict[str, dict[int, float]] = {}
        for row in run.rows():
            for name, value in row.items():
                if name not in ("step", "stage", "stage_step", "version") and isinstance(value, int | float):
                    by_step.setdefault(name, {})[row["step"]] = float(value)
        series = {name: sorted(points.items()) for name, points in by_step.items()}
        return RunMetrics(run.path, flat(run_config(run)), series, max((p[-1][0] for p in series.values()), default=0))

    def final(self, metric: str) -> Point | None:
        """The last value, with its step."""
        return self.series[metric][-1] if metric in self.series else None

    def best(self, metric: str) -> Point | None:
        """The best value with the first step that had it; None for metrics of which neither more nor less is better."""
        numbers = [p for p in self.series.get(metric, []) if math.isfinite(p[1])]
        lower, higher = metric.startswith(LOWER_IS_BETTER), HIGHER_IS_BETTER.fullmatch(metric)
        if not numbers or not (lower or higher):
            return None
        wanted = (min if lower else max)(v for _, v in numbers)
        return next(p for p in numbers if p[1] == wanted)

    def at(self, metric: str, step: int) -> float | None:
        """The value that was logged at a step of the run."""
        return dict(self.series.get(metric, [])).get(step)


def chosen_metrics(runs: Sequence[RunMetrics], wanted: Sequence[str]) -> list[str]:
    """The metrics to compare, in order: the wanted ones (a name that ends in ``/`` stands for all below it), else the usual ones.

    Raises:
        ConfigError: No run has a wanted one.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.series))
    chosen: list[str] = []
    for name in wanted or SHOWN:
        found = sorted(k for k in known if k == name or (name.endswith("/") and k.startswith(name)))
        if wanted and not found:
            raise ConfigError(
                f"none of the runs has a metric {name!r}.{did_you_mean(name, known)} They have {', '.join(sorted(known)) or 'none yet'}."
            )
        chosen += [f for f in found if f not in chosen]
    return chosen


def differences(runs: Sequence[RunMetrics]) -> dict[str, list[Any]]:
    """Keys of the configurations that are not alike in all runs, with each run's value (``<not set>`` where it has none)."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    found = {key: [run.config.get(key, "<not set>") for run in runs] for key in keys if key not in ASIDE}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` → ``{"a.b": 1}``; lists and empty mappings are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def labels(runs: Sequence[RunMetrics]) -> list[str]:
    """A short name for each run: its directory's, or its whole path where two are alike."""
    names = [run.path.resolve().name for run in runs]
    return [n if names.count(n) == 1 else str(run.path) for n, run in zip(names, runs, strict=True)]


def draw(runs: Sequence[RunMetrics], metrics: Sequence[str], path: Path) -> None:
    """A PNG with one picture a metric and one curve a run. Raises ConfigError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(4.6 * columns, 3 * lines), layout="constrained", squeeze=False)
    for axes, metric in zip(grid.flat, metrics, strict=False):
        for run, label in zip(runs, labels(runs), strict=True):
            if points := run.series.get(metric):
                axes.plot(*zip(*points, strict=True), "o-" if len(points) < 20 else "-", markersize=3, label=label)
        axes.set(title=metric, xlabel="step")
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(metrics) :]:
        axes.set_visible(False)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: the plot cannot be written ({error.strerror})") from error
    finally:
        pyplot.close(figure)
