"""How a finished run takes its leave: the curve, one trajectory before and after, and what to do next."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from rich.markup import escape
from rich.panel import Panel

from ..lora import holds_model, is_adapter
from ..run_dir import RunDir
from ..sample import Sample
from ..sample_io import load_samples


def ending(run_dir: RunDir) -> list[str | Panel]:
    """What is printed after the last step, in markup; writes ``reward.png`` if there were rewards."""
    rows = [row for row in run_dir.rows() if "reward" in row]
    parts: list[str | Panel] = []
    accuracies: dict[str, list[float]] = {}
    for row in run_dir.rows():
        for key in (k for k in row if k.startswith("eval/") and "/avg@" in k):
            accuracies.setdefault(key, []).append(row[key])
    for key, values in accuracies.items():
        parts.append(f"[bold]{key.removeprefix('eval/')}[/]: {values[0]:.3f} before, [bold green]{values[-1]:.3f}[/] after")
    parts += _before_and_after(run_dir)
    if rows:
        parts.append(f"Curve: {plot(run_dir)}" if find_spec("matplotlib") else escape("Curve: pip install 'miles-core[report]' draws it"))
    final = run_dir.models / "final"
    kind = " (a PEFT directory)" if is_adapter(final / "policy") else " (a Hugging Face directory)" if holds_model(final / "policy") else ""
    here = escape(str(run_dir.path))
    parts.append(f"Weights: {escape(str(final))}/policy{kind}")
    parts.append(f"Metrics: {escape(str(run_dir.metrics))} (curves: tensorboard --logdir {here})")
    parts.append(f"Look into it: [bold]miles inspect {here}[/] (--html FILE: in a browser)")
    parts.append(f"Take it away: [bold]miles export {here} DIRECTORY[/]")
    parts.append("Next: another seed ([bold]seed=1[/]), your own reward (README.md), your own task (docs/quickstart.md)")
    return parts


def plot(run_dir: RunDir) -> Path:
    """``reward.png``: reward of every step and held-out accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(run_dir.rows())
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    trained = [(r["step"], r["reward"]) for r in rows if "reward" in r]
    first = trained[0][0] - 1
    axes.plot([s - first for s, _ in trained], [v for _, v in trained], color="#9ecae1", label="reward while training")
    for key in sorted({k for r in rows for k in r if k.startswith("eval/") and "/avg@" in k}):
        found = [(r["step"] - first, r[key]) for r in rows if key in r]
        axes.plot(*zip(*found, strict=True), "o-", color="#08519c", label=f"{key.removeprefix('eval/')}")
    axes.set(xlabel="step", ylabel="reward", title=run_dir.path.name)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path = run_dir.path / "reward.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _before_and_after(run_dir: RunDir) -> list[Panel]:
    """The same held-out prompt at the first and the last evaluation: one that became right, if there is any."""
    files = sorted(run_dir.trajectories.glob("eval-*.safetensors"))
    last = max(files, key=lambda f: f.stem.rsplit("-", 1)[1], default=None)
    same = [f for f in files if last is not None and f.stem.rsplit("-", 1)[0] == last.stem.rsplit("-", 1)[0]]
    if len(same) < 2:
        return []
    before, after = ({(s.id.prompt, s.id.trajectory): s for s in load_samples(f)} for f in (same[0], same[-1]))
    gains = {k: (after[k].reward or 0) - (before[k].reward or 0) for k in before if k in after}
    best = max(gains, key=lambda k: (gains[k], after[k].n_sampled))
    return [Panel(_text(s), title=t, title_align="left", width=78) for t, s in (("before", before[best]), ("after", after[best]))]


def _text(sample: Sample) -> str:
    response = escape(str(sample.metadata.get("response", "")))
    return f"[dim]{escape(str(sample.prompt))}[/]{response}\nreward {sample.reward:g}, {sample.status}"
