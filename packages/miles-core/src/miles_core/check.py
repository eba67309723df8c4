"""Whether a configuration makes sense as a whole, without torch: what ``miles check`` says before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .config import LoraConfig, ModelConfig, RunConfig, StageConfig
from .errors import ConfigError
from .learner import ROLE_GIVES
from .lora import base_of, check_adapter, is_adapter, lacks_peft, without_base
from .model_files import check_files
from .models import local_model
from .starts import check_undescribed


def check(config: RunConfig) -> None:
    """Raise a ConfigError that lists every problem, each with what to do."""
    problems, trained = [], dict[str, LoraConfig | None]()
    for name, stage in config.stages.items():
        problems += [f"stage {name}: {p}" for p in _stage_problems(stage, frozenset(trained))]
        if config.numerics == "bitwise":
            problems += [f"stage {name}: {p}" for p in _bitwise_problems(config, stage)]
        problems += [f"stage {name}: {p}" for p in _changed_adapters(stage, trained)]
        trained |= {model_name: model.lora for model_name, model in stage.models.items() if model.learns}
    if not config.stages:
        problems.append("the recipe has no stages; leave the key out for a single one")
    if "final" in config.stages:
        problems.append("stage final: models/final is where the last stage's weights go; give the stage another name")
    if problems:
        raise ConfigError("\n".join(problems))


def missing(config: RunConfig) -> list[str]:
    """What this machine lacks for the run, each a sentence; looked for before anything is built, lest a later stage find out."""
    models = [model for stage in config.stages.values() for model in stage.models.values()]
    parts = [plugin for model in models for plugin in (model.trainer, model.engine) if plugin is not None]
    parts += [p for stage in config.stages.values() for p in stage.data.nested()]
    parts += [p for stage in config.stages.values() for one in (*stage.rewards.values(), *stage.evaluators.values()) for p in one.nested()]
    lacking = [sentence for model in models for sentence in _no_weights(model)]
    return list(dict.fromkeys([*lacking, *(f"{p.point} {p.use!r}: {sentence}" for p in parts for sentence in p.missing())]))


def _stage_problems(stage: StageConfig, trained: frozenset[str]) -> Iterator[str]:
    """``trained``: models that stages before have trained and hand on."""
    if stage.steps == 0:
        yield "steps is 0: nothing would be trained. Set it to at least 1, or take the stage out"
    owners = stage.owners()
    if not owners:
        yield "models has no policy; one model needs role: policy (or reward, to train a reward model)"
        return
    if len({stage.models[n].role for n in owners}) > 1:
        both = ", ".join(owners)
        yield f"it has policies and a reward model that learns ({both}); samples are of one kind: train them in stages of their own"
    trajectories = stage.groups * getattr(stage.rollout, "group_size", stage.minibatches)
    if trajectories < stage.minibatches:
        yield f"minibatches is {stage.minibatches}, but a step has only {trajectories} trajectories; lower it or raise groups"
    for name, model in stage.models.items():
        yield from (f"model {name}: {p}" for p in _origin_problems(name, model, stage, trained))
        yield from (f"model {name}: {p}" for p in _file_problems(model, name in trained))
        yield from (f"model {name}: {p}" for p in _model_problems(name, model, stage, owners))
    if "environment" in stage.rewards:
        yield "rewards.environment: that is the name of the environment's own part of the reward; give the reward another"
    for field in ("rollout", "data", "rewards", "evaluators", "group_filters", "sample_filters"):
        value = getattr(stage, field)
        for plugin in value.values() if isinstance(value, dict) else [value]:
            yield from (f"{field} {inner.use}: {p}" for inner in plugin.nested() for p in inner.problems(stage))


def _bitwise_problems(config: RunConfig, stage: StageConfig) -> Iterator[str]:
    if config.device == "cuda":
        yield "numerics: bitwise is for a CPU so far; set device: cpu"
    for name, model in stage.models.items():
        for kind, plugin in (("trainer", model.trainer), ("engine", model.engine)):
            if plugin is not None:
                yield from (f"model {name}: {kind} {plugin.use!r} {problem}" for problem in plugin.bitwise_problems())


def _changed_adapters(stage: StageConfig, trained: Mapping[str, LoraConfig | None]) -> Iterator[str]:
    """An adapter is handed on as it is: its shape stays. A stage without lora merges it and trains all weights."""
    for name, model in stage.models.items():
        before = trained.get(name)
        if before is not None and model.lora is not None and model.lora != before:
            yield f"model {name}: lora is another than in the stage before, which hands its adapter on; give both the same, or lora: null"


def _adapter_problems(model: ModelConfig) -> Iterator[str]:
    if model.lora is None:
        return
    if model.role != "policy":
        yield f"lora is for policies, this is a {model.role}; leave it out (a path may be a PEFT directory)"
    for kind, plugin in (("trainer", model.trainer), ("engine", model.engine)):
        if plugin is not None and not plugin.takes_lora:
            yield f"{kind} {plugin.use!r} takes no adapter (lora); trainer torch and engine local do"


def _model_problems(name: str, model: ModelConfig, stage: StageConfig, owners: list[str]) -> Iterator[str]:
    if model.path is not None and model.config is not None:
        yield "path and config are both given; give path (a checkpoint) or config (fields of a model built from scratch)"
    if model.config is not None and model.tokenizer is None:
        yield "a model built from scratch needs a tokenizer"
    if not model.has_samples:
        if model.of is None and len(owners) != 1:
            yield f"of is missing: which policy is it the {model.role} of? ({', '.join(owners)})"
        if model.of is not None and model.of not in owners:
            yield f"of names {model.of!r}, which is no policy ({', '.join(owners)})"
    if "engine" in stage.rollout.required() and model.role == "policy" and model.engine is None:
        yield f"rollout {stage.rollout.use!r} samples from it, but it has no engine; add e.g. engine: {{use: local}}"
    yield from _adapter_problems(model)
    for kind, plugin in (("trainer", model.trainer), ("engine", model.engine), ("transport", model.transport)):
        if plugin is not None:
            yield from (f"{kind} {plugin.use!r}: {p}" for p in plugin.problems(stage))
    if model.engine is not None and model.transport.within_process and not model.engine.in_process:
        yield (
            f"transport {model.transport.use!r} hands tensors over within a process, but engine {model.engine.use!r} is another; "
            "use transport: collective, tensor or disk"
        )
    if model.engine is not None and model.transport.broadcasts:
        yield from (
            f"transport {model.transport.use!r} sends through a process group on this machine, but engine {model.engine.use!r} {p}; "
            f"use transport: {'inline' if model.engine.in_process else 'tensor'}"
            for p in model.engine.broadcast_problems()
        )
    owner = name if model.has_samples else model.of or owners[0]
    if not model.learns or owner not in owners:
        return
    if not model.losses and not model.trainer.brings_weights:
        yield "it learns, but has no losses; add e.g. losses: {ppo: {use: ppo_clip}}"
    if model.frozen_steps >= stage.steps > 0:
        yield f"frozen_steps is {model.frozen_steps} of {stage.steps} steps, so it would never learn; lower it"
    given = columns_given(name, owner, stage)
    for plugin in model.algorithms():
        for need in sorted(plugin.required() - given):
            yield f"{plugin.point} {plugin.use!r} needs {need!r}, which nothing gives. {WHO_GIVES.get(need, '')}".rstrip()
        yield from (f"{plugin.point} {plugin.use!r}: {p}" for p in plugin.problems(stage))
    yield from _senseless_combinations(model, given)


def _origin_problems(name: str, model: ModelConfig, stage: StageConfig, trained: frozenset[str]) -> Iterator[str]:
    """Where the starting weights of a model without path and config come from."""
    if model.path is not None or model.config is not None or model.trainer.brings_weights or name in trained:
        return
    start = model.of or next((n for n in stage.owners() if n != name), None)
    other = stage.models.get(start or "")
    known = start in trained or (other is not None and (other.path or other.config) is not None)
    if model.role == "policy":
        yield "neither path nor config is given; give path (a checkpoint) or config (fields of a model built from scratch)"
    elif model.role == "teacher":
        yield "a teacher needs weights of its own: give path or config, or train a model of this name in a stage before"
    elif not known:
        yield (
            f"neither path nor config is given, and {start or 'of'!r} names no model that this stage builds or a stage before trained; "
            "give path, config or of"
        )


def _file_problems(model: ModelConfig, handed_on: bool) -> Iterator[str]:
    """What is wrong with the directories that a model starts from, as far as their files say without torch.

    ``handed_on``: It starts from what a stage before made of it.
    """
    for path in _paths(model):
        try:
            directory = local_model(path)
        except ConfigError:  # not on this machine (``missing``)
            continue
        try:
            if directory is not None:
                check_files(directory)
                if path != model.path:
                    check_adapter(directory)
                elif model.lora is not None and is_adapter(directory) and not handed_on:
                    check_undescribed(model.lora, directory)
        except ConfigError as error:
            yield str(error)


def _no_weights(model: ModelConfig) -> Iterator[str]:
    """That what a model's path names, or the model that an adapter there names, is neither here nor on the hub; and PEFT, where there is
    an adapter to train, to read or to merge."""
    adapter = model.lora is not None
    for path in _paths(model):
        try:
            directory = local_model(path)
            if path == model.path and directory is not None and is_adapter(directory):
                adapter, base = True, base_of(directory)
                try:
                    local_model(base)
                except ConfigError as error:
                    raise without_base(directory, base, error) from error
        except ConfigError as error:
            yield str(error)
    if adapter and (sentence := lacks_peft()):
        yield sentence


def _paths(model: ModelConfig) -> list[str]:
    """Of a model and of the adapter beside it."""
    return [path for path in (model.path, model.lora.path if model.lora else None) if path is not None]


def _senseless_combinations(model: ModelConfig, given: frozenset[str]) -> Iterator[str]:
    """Algorithms that are each right and together wrong."""
    losses = list(model.losses.values())
    if model.kl_reward and any(loss.use == "kl" for loss in losses):
        yield "kl_reward and a kl loss are both given: the divergence would be paid for twice; keep one"
    if model.kl_reward and "ref_logprobs" not in given:
        yield f"kl_reward needs 'ref_logprobs', which nothing gives. {WHO_GIVES['ref_logprobs']}"
    if model.kl_reward and model.advantage is None:
        yield "kl_reward enters the advantage, but there is none; add advantage: {use: …} or put a kl term into the losses"
    if model.corrections and "logprobs" not in given:
        yield f"corrections compare with the rollout's 'logprobs', which nothing gives. {WHO_GIVES['logprobs']}"
    if model.corrections and model.advantage is None:
        yield "corrections weigh policy-gradient terms, but there is no advantage; take them out or add advantage: {use: …}"
    for loss in losses:
        old = getattr(loss, "old", "recompute")
        if model.corrections and old != "recompute":
            yield (
                f"loss {loss.use!r} has old: {old}, so its ratio already starts from "
                f"{'the rollout' if old == 'rollout' else 'the present weights'}, and corrections would have nothing to compare; "
                "use old: recompute, or take the corrections out"
            )
        head = "language" if model.role == "policy" else "scalar"
        if loss.head != head:
            fitting = "a policy" if loss.head == "language" else "a critic or reward model"
            hint = f" (a function of your own says what it reads: @miles.loss(head={head!r}))" if ":" in loss.use else ""
            yield f"loss {loss.use!r} belongs to {fitting}, this is a {model.role}; move it there{hint}"
        if loss.unit == "pair" and model.advantage is not None and model.advantage.varies():
            yield (
                f"loss {loss.use!r} reads from the advantages which answer of a pair is preferred, but those of {model.advantage.use!r} "
                "differ between tokens; use advantage: {use: preference}"
            )
        if loss.unit == "pair" and model.aggregation.use != "sequence_mean":
            yield (
                f"loss {loss.use!r} is one number a pair, which {model.aggregation.use!r} would weigh by length; "
                "use aggregation: {use: sequence_mean}"
            )


WHO_GIVES = {
    "rewards": "Add rewards, or an environment that gives one",
    "groups": "Set the rollout's group_size to at least 2",
    "advantages": "Add advantage: {use: …} to the model",
    "values": "Add a model with role: critic",
    "returns": "Use an advantage that gives them, e.g. advantage: {use: gae}",
    "ref_logprobs": "Add a model with role: reference",
    "teacher_logprobs": "Add a model with role: teacher",
    "pairs": "Use rollout: {use: read_pairs}, or group_size: 2 with rewards that differ",
    "logprobs": "Use a rollout that samples; one of your own says what it gives: @miles.rollout(gives={'logprobs', 'rewards'})",
}


def columns_given(name: str, owner: str, stage: StageConfig) -> frozenset[str]:
    """What the algorithms of a model, which is or serves the policy ``owner``, can count on, given the rest of the stage."""
    given = {"tokens", "versions", "loss_mask", "old_logprobs", *stage.rollout.provided()}
    if stage.rewards:
        given |= {"rewards"}
    group_size = getattr(stage.rollout, "group_size", 2)
    given |= ({"groups"} if group_size >= 2 else set()) | ({"pairs"} if group_size == 2 else set())
    for other in stage.models.values():
        given |= ROLE_GIVES[other.role] if other.of in (None, owner) else set()
    for plugin in (stage.models[name].advantage, stage.models[owner].advantage):
        given |= plugin.provided() if plugin else set()
    return frozenset(given)
