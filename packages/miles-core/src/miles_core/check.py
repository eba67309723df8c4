"""Whether a configuration makes sense as a whole, without torch: what ``miles check`` says before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

from .config import ModelConfig, RunConfig, StageConfig
from .errors import ConfigError


def check(config: RunConfig) -> None:
    """Raise a ConfigError that lists every problem, each with what to do."""
    problems = [f"stage {name}: {p}" for name, stage in config.stages.items() for p in _stage_problems(stage)]
    if not config.stages:
        problems.append("the recipe has no stages; leave the key out for a single one")
    if "final" in config.stages:
        problems.append("stage final: models/final is where the last stage's weights go; give the stage another name")
    if problems:
        raise ConfigError("\n".join(problems))


def _stage_problems(stage: StageConfig) -> Iterator[str]:
    if stage.steps == 0:
        yield "steps is 0: nothing would be trained. Set it to at least 1, or take the stage out"
    policies = [n for n, m in stage.models.items() if m.role == "policy"]
    if not policies:
        yield "models has no policy; one model needs role: policy"
        return
    trajectories = stage.groups * getattr(stage.rollout, "group_size", stage.minibatches)
    if trajectories < stage.minibatches:
        yield f"minibatches is {stage.minibatches}, but a step has only {trajectories} trajectories; lower it or raise groups"
    for name, model in stage.models.items():
        yield from (f"model {name}: {p}" for p in _model_problems(name, model, stage, policies))
    for field in ("rollout", "data", "rewards", "evaluators", "group_filters", "sample_filters"):
        value = getattr(stage, field)
        for plugin in value.values() if isinstance(value, dict) else [value]:
            yield from (f"{field} {plugin.use}: {p}" for p in plugin.problems(stage))


def _model_problems(name: str, model: ModelConfig, stage: StageConfig, policies: list[str]) -> Iterator[str]:
    if model.path is not None and model.config is not None:
        yield "path and config are both given; give path (a checkpoint) or config (fields of a model built from scratch)"
    if model.path is None and model.config is None and model.role == "policy":
        yield "neither path nor config is given; give path (a checkpoint) or config (fields of a model built from scratch)"
    if model.config is not None and model.tokenizer is None:
        yield "a model built from scratch needs a tokenizer"
    if model.role != "policy":
        if model.of is None and len(policies) != 1:
            yield f"of is missing: which policy is it the {model.role} of? ({', '.join(policies)})"
        if model.of is not None and model.of not in policies:
            yield f"of names {model.of!r}, which is no policy ({', '.join(policies)})"
    if "engine" in stage.rollout.required() and model.role == "policy" and model.engine is None:
        yield f"rollout {stage.rollout.use!r} samples from it, but it has no engine; add e.g. engine: {{use: local}}"
    for kind, plugin in (("trainer", model.trainer), ("engine", model.engine), ("transport", model.transport)):
        if plugin is not None:
            yield from (f"{kind} {plugin.use!r}: {p}" for p in plugin.problems(stage))
    owner = name if model.role == "policy" else model.of or policies[0]
    if not model.learns or owner not in policies:
        return
    if not model.losses:
        yield "it learns, but has no losses; add e.g. losses: {ppo: {use: ppo_clip}}"
    given = columns_given(name, owner, stage)
    for kind, plugins in (("advantage", [model.advantage]), ("loss", list(model.losses.values())), ("aggregation", [model.aggregation])):
        for plugin in plugins:
            if plugin is None:
                continue
            for need in sorted(plugin.required() - given):
                yield f"{kind} {plugin.use!r} needs {need!r}, which nothing gives. {WHO_GIVES.get(need, '')}".rstrip()
            yield from (f"{kind} {plugin.use!r}: {p}" for p in plugin.problems(stage))


WHO_GIVES = {
    "rewards": "Add rewards, or an environment that gives one",
    "groups": "Set the rollout's group_size to at least 2",
    "advantages": "Add advantage: {use: …} to the model",
    "values": "Add a model with role: critic",
    "ref_logprobs": "Add a model with role: reference",
    "logprobs": "Use a rollout that samples; one of your own says what it gives: @miles.rollout(gives={'logprobs', 'rewards'})",
}


def columns_given(name: str, owner: str, stage: StageConfig) -> frozenset[str]:
    """What the algorithms of a model, which is or serves the policy ``owner``, can count on, given the rest of the stage."""
    given = {"tokens", "versions", "loss_mask", "old_logprobs", *stage.rollout.provided()}
    if stage.rewards:
        given |= {"rewards"}
    if getattr(stage.rollout, "group_size", 2) >= 2:
        given |= {"groups"}
    for other in stage.models.values():
        given |= {"critic": {"values"}, "reference": {"ref_logprobs"}}.get(other.role, set()) if other.of in (None, owner) else set()
    for plugin in (stage.models[name].advantage, stage.models[owner].advantage):
        given |= plugin.provided() if plugin else set()
    return frozenset(given)
