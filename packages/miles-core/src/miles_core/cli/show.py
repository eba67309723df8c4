"""What ``miles check`` and ``miles recipes`` print."""

from __future__ import annotations

from pathlib import Path

from rich.tree import Tree

from ..config import ModelConfig, RunConfig, StageConfig


def first_comment(path: Path) -> str:
    """The first comment line of a recipe: what it does."""
    first = path.read_text().split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def plan(config: RunConfig) -> Tree:
    """What a run would do, stage by stage."""
    steps = sum(s.steps for s in config.stages.values())
    handed_on: dict[str, str] = {}  # model: the stage whose weights it goes on from
    tree = Tree(f"[bold]{config.name}[/] · seed {config.seed} · {steps} steps · {config.runs_dir / config.name}")
    for name, stage in config.stages.items():
        branch = tree.add(f"[bold]{name}[/]: {stage.steps} steps of {stage.groups} groups, {_mode(stage)}")
        rewards = ", ".join(stage.rewards) or "the environment's, if any"
        branch.add(f"rollout {stage.rollout.use}{_size(stage)} over {stage.data.use}; rewards: {rewards}")
        for model_name, model in stage.models.items():
            after = f"the weights of stage {handed_on[model_name]}" if model_name in handed_on else None
            made = f"a new {model.config.get('model_type')}" if model.config else f"the weights of {model.of or 'the policy'}"
            origin = (
                f"trainer {model.trainer.use}"
                if model.trainer.brings_weights
                else f"from {after or model.path or made}, trainer {model.trainer.use}{_adapter(model)}"
            )
            branch.add(f"{model.role} [bold]{model_name}[/] {origin}{_learning(model)}")
        handed_on |= {n: name for n, m in stage.models.items() if m.losses}
        for evaluator, plugin in stage.evaluators.items():
            branch.add(f"evaluator {evaluator} ({plugin.use}) every {stage.every.evaluate} steps")
    return tree


def _adapter(model: ModelConfig) -> str:
    """`` with lora (rank 8)``."""
    if model.lora is None:
        return ""
    said = ", ".join(f"{key} {value}" for key, value in model.lora.model_dump(exclude_none=True).items())
    return f" with lora ({said})" if said else " with lora"


def _learning(model: ModelConfig) -> str:
    """Engine and objective: ``, engine local, advantage grpo, correction tis, loss ppo_clip + 0.1 kl by token_mean``."""
    engine = f", engine {model.engine.use}" if model.engine else ""
    if not model.losses:
        return engine
    terms = [(f"{loss.coefficient:g} " if loss.coefficient != 1 else "") + loss.use for loss in model.losses.values()]
    advantage = f", advantage {model.advantage.use}" if model.advantage else ""
    kl = f" with {model.kl_reward.coefficient:g} {model.kl_reward.estimator.use} in the reward" if model.kl_reward else ""
    corrections = f", correction {' × '.join(c.use for c in model.corrections.values())}" if model.corrections else ""
    frozen = f", frozen for {model.frozen_steps} steps" if model.frozen_steps else ""
    return f"{engine}{advantage}{kl}{corrections}, loss {' + '.join(terms)} by {model.aggregation.use}{frozen}"


def _mode(stage: StageConfig) -> str:
    old = stage.max_staleness
    return "rollout and training in turns" if old == 0 else f"data at most {old} version{'s' if old > 1 else ''} old"


def _size(stage: StageConfig) -> str:
    size = getattr(stage.rollout, "group_size", 1)
    return f" × {size}" if size > 1 else ""
