"""The model card of an export: the facts of the run that made the weights, for people and for the Hugging Face hub."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from ..config import ModelConfig, RunConfig
from ..models import is_hub_id
from ..run_dir import RunDir

LIBRARIES = ("miles-core", "miles-train", "miles-rollout", "torch", "transformers")

USE = """

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```
"""


USE_ADAPTER = """

## Use

The directory holds an adapter (LoRA); the model that it belongs to is named in `adapter_config.json`.

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```
"""


def model_card(run: RunDir, config: RunConfig, stage: str, name: str, step: int, title: str, adapter_of: str | None = None) -> str:
    """The text of ``README.md``.

    Args:
        run, config: The run.
        stage: The stage that trained the weights last.
        name: The model.
        step: Steps of the run that they have been through.
        title: The directory's name.
        adapter_of: The model that the directory holds an adapter of, which a stage may have trained; None where it holds a whole one.
    """
    model = config.stages[stage].models[name]
    base = base_of(config, name)
    hub = {
        "library_name": "peft" if adapter_of else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["miles", "reinforcement-learning"],
    }
    beside = adapter_of or base.path
    if beside is not None and is_hub_id(beside):
        hub["base_model"] = beside
    facts = {
        "run": f"{config.name}, seed {config.seed}",
        "base model": said_of(base),
        "stages": stages_until(config, step),
        "weights after": f"step {step} of {sum(s.steps for s in config.stages.values())}",
        "objective": objective(model),
        "configuration": f"fingerprint {config.fingerprint()}",
        "trained with": trained_with(run),
        "exported": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC with {', '.join(versions())}",
    }
    metrics = metrics_at(run, step)
    lines = ["---", yaml.safe_dump(hub, sort_keys=False).strip(), "---", "", f"# {config.name}, step {step}", ""]
    lines += ["A language model that was post-trained with Miles. These are the facts of the run that made it.", ""]
    lines += _table(("", ""), [(k, v) for k, v in facts.items() if v])
    note = "`mismatch/…`: how far the trainer's log-probabilities are from the rollout engine's, for tokens of the same weights."
    if metrics:
        lines += ["", "## Metrics", "", "The last of each that was logged up to these weights.", ""]
        lines += _table(("metric", "value", "step"), [(k, _number(v), s) for k, (v, s) in metrics.items()])
    if any(name.startswith("mismatch/") for name in metrics):
        lines += ["", note]
    return "\n".join(lines) + (USE_ADAPTER if adapter_of else USE).replace("DIRECTORY", title)


def base_of(config: RunConfig, name: str) -> ModelConfig:
    """The model as the first stage that has it starts it."""
    return next(s.models[name] for s in config.stages.values() if name in s.models)


def said_of(base: ModelConfig) -> str:
    """What the weights began as. Of a directory its name only: where it lies is nobody's business who reads the card."""
    if base.path is None:
        return f"made from scratch: {json.dumps(base.config)}"
    return base.path if is_hub_id(base.path) else f"{Path(base.path).resolve().name}, a local directory"


def stages_until(config: RunConfig, step: int) -> str:
    """``sft: 150 steps, rl: 5 of 10 steps``."""
    said, before = [], 0
    for name, stage in config.stages.items():
        if (done := min(stage.steps, step - before)) > 0:
            said.append(f"{name}: {done} steps" if done == stage.steps else f"{name}: {done} of {stage.steps} steps")
        before += stage.steps
    return ", ".join(said)


def objective(model: ModelConfig) -> str:
    """``advantage grpo, loss ppo_clip by token_mean``."""
    advantage = f"advantage {model.advantage.use}, " if model.advantage else ""
    terms = " + ".join((f"{t.coefficient:g} " if t.coefficient != 1 else "") + t.use for t in model.losses.values())
    return f"{advantage}loss {terms} by {model.aggregation.use}" if terms else ""


def trained_with(run: RunDir) -> str:
    """Version of Miles and the time of the last metrics; nothing of what is not recorded."""
    version = f"Miles {json.loads(run.facts.read_text())['miles']}" if run.facts.is_file() else ""
    until = f"{datetime.fromtimestamp(run.metrics.stat().st_mtime, UTC):%Y-%m-%d %H:%M} UTC" if run.metrics.is_file() else ""
    return ", until ".join(part for part in (version, until) if part)


def versions() -> list[str]:
    """``miles-core 0.1.0`` … of what is installed here."""
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def metrics_at(run: RunDir, step: int) -> dict[str, tuple[float, int]]:
    """(value, step) of what a reader of the card wants to know, as last logged up to ``step``."""
    found: dict[str, tuple[float, int]] = {}
    for row in run.rows():
        if row["step"] <= step:
            found |= {k: (v, row["step"]) for k, v in row.items() if _wanted(k) and isinstance(v, int | float) and math.isfinite(v)}
    return dict(sorted(found.items()))


def _wanted(metric: str) -> bool:
    return metric in ("reward", "loss", "length/sampled", "truncated", "entropy", "kl") or metric.startswith(("eval/", "mismatch/"))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in cells]
