"""Algorithms by recipe and by override: every advantage × policy loss runs, and the recipes for PPO, DPO, reward models and OPD learn."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml

from miles_core.config import resolve
from miles_core.models import materialize
from miles_core.plugin_finding import find_all
from miles_core.plugins import config_class

TINY = """
extends: {recipe}
name: tiny
trackers: {{}}
models: {{policy: {{config: {{hidden_size: 16, intermediate_size: 16, head_dim: 4, num_hidden_layers: 1}}}}}}
"""

ONE_STEP = """
stages:
  sft: null
  rl:
    steps: 1
    groups: 2
    rollout: {{group_size: {group_size}, sampling: {{max_tokens: 6}}}}
    environment_weight: 0.0
    rewards: {{long: {{use: "rewards:long"}}}}
    models:
      policy: {{advantage: {advantage}, losses: {losses}, aggregation: {{use: {aggregation}}}}}
{servants}
    evaluators: {{held_out: null}}
    every: {{checkpoint: 0, trajectories: 0}}
"""

REWARDS = '''
def long(sample):
    """0 or 1, varying within a group, so that no advantage is 0 throughout."""
    return float(sample.tokens[-1] % 2)
'''

SERVANTS = {
    "critic": "      critic: {role: critic, losses: {v: {use: value_clip}}, trainer: {use: torch}}",
    "teacher": "      teacher: {role: teacher, trainer: {use: torch}, path: teacher}",
    "reference": "      reference: {role: reference, trainer: {use: torch}}",
}
PAIRS = ("dpo", "ipo")
ADVANTAGES = sorted(find_all("advantage"))
LOSSES = sorted(name for name in find_all("loss") if config_class("loss", name).head == "language")


def rows_of(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]


def senseless(advantage: str, loss: str) -> str | None:
    """What ``miles check`` must refuse of a combination, as part of its sentence."""
    if loss in ("gspo", "gmpo") and config_class("advantage", advantage).per_token:
        return "differs between tokens"
    if loss in PAIRS and config_class("advantage", advantage).per_token:
        return "preference"
    return None


def with_options(point: str, name: str) -> dict:
    """The plug-in with the options that have no default."""
    return {"use": name} | ({"k": 2} if name == "pass_at_k" else {})


def one_step(advantage: str, loss: str) -> str:
    """The quick start's RL stage, one step of a tiny model, with this advantage and loss."""
    config = config_class("loss", loss)
    pairs = loss in PAIRS or advantage == "preference"
    options = "k: 2" if advantage == "pass_at_k" else ""  # the only one without a default
    chosen = config_class("advantage", advantage).model_validate(yaml.safe_load(f"{{use: {advantage}, {options}}}"))
    needs = config.model_validate({"use": loss}).required() | chosen.required()
    given = {"critic": "values", "teacher": "teacher_logprobs", "reference": "ref_logprobs"}
    servants = "\n".join(SERVANTS[role] for role, column in given.items() if column in needs)
    return TINY.format(recipe="quickstart") + ONE_STEP.format(
        advantage=f"{{use: {advantage}, {options}}}",
        losses=f"{{ppo: null, term: {{use: {loss}}}}}",
        group_size=2 if pairs else 4,
        aggregation="sequence_mean" if config.unit == "pair" else "token_mean",
        servants=servants,
    )


def write_teacher(directory: Path) -> None:
    """A model of its own with the policy's vocabulary, as ``miles run`` would build it."""
    policy = resolve("quickstart").stages["rl"].models["policy"]
    small = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 4, "num_hidden_layers": 1}
    materialize(None, policy.config | small, policy.tokenizer, [], directory, seed=1)


def runs_or_is_refused(miles, advantage: str, loss: str) -> None:
    Path("rewards.py").write_text(REWARDS)
    write_teacher(Path("teacher"))
    Path("tiny.yaml").write_text(one_step(advantage, loss))
    said = miles("run", "tiny.yaml", f"name={advantage}-{loss}")
    if problem := senseless(advantage, loss):
        assert said.code == 1 and problem in said.sentence
        return
    assert said.code == 0, said.err
    [row] = rows_of(f"{advantage}-{loss}")
    assert row["optimizer_steps"] == 1 and row["tokens"] > 0
    assert all(value == value and abs(value) < 1e6 for value in row.values() if isinstance(value, float))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs(miles, loss):
    runs_or_is_refused(miles, "preference" if loss in PAIRS else "grpo", loss)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_advantage_runs(miles, advantage):
    runs_or_is_refused(miles, advantage, "ppo_clip")


@pytest.mark.slow
@pytest.mark.parametrize(("advantage", "loss"), list(itertools.product(ADVANTAGES, LOSSES)))
def test_every_advantage_runs_with_every_loss_or_is_refused(miles, advantage, loss):
    runs_or_is_refused(miles, advantage, loss)


SHORT = {
    "ppo": "stages: {sft: {steps: 2, groups: 8}, rl: {steps: 4, groups: 2, rollout: {group_size: 4}, models: {policy: {frozen_steps: 2}}}}",
    "dpo": "stages: {sft: {steps: 2, groups: 8}, dpo: {steps: 2, groups: 4}}",
    "reward_model": "stages: {sft: {steps: 2, groups: 8}, reward: {steps: 2, groups: 4}, "
    "rl: {steps: 2, groups: 2, rollout: {group_size: 4}}}",
    "opd": "stages: {teacher: {steps: 2, groups: 8}, sft: {steps: 2, groups: 8}, rl: {steps: 2, groups: 2, rollout: {group_size: 4}}}",
}


def short(recipe: str) -> str:
    """A few steps of every stage of a recipe, with few held-out prompts."""
    last = "dpo" if recipe == "dpo" else "rl"
    few = f"stages: {{{last}: {{evaluators: {{held_out: {{prompts: 4}}}}}}}}"
    Path("few.yaml").write_text(f"extends: algorithms/{recipe}\n{few}\n")
    return TINY.format(recipe="few.yaml") + SHORT[recipe]


@pytest.mark.parametrize("recipe", SHORT)
def test_a_few_steps_of_every_recipe(miles, recipe):
    Path("short.yaml").write_text(short(recipe))
    said = miles("run", "short.yaml")
    assert said.code == 0, said.err
    rows = [r for r in rows_of("tiny") if r["stage_step"]]
    last = rows[-1]
    if recipe == "ppo":
        frozen, learning = rows[2:4], rows[4:]
        assert all("critic/loss" in r and "loss" not in r for r in frozen), "the policy waits for its critic"
        assert all("critic/loss" in r and "loss" in r for r in learning)
    if recipe == "dpo":
        assert {"accuracy", "margin"} <= last.keys()
    if recipe == "reward_model":
        assert [r["stage"] for r in rows] == ["sft"] * 2 + ["reward"] * 2 + ["rl"] * 2
        from transformers import AutoModelForSequenceClassification

        model, info = AutoModelForSequenceClassification.from_pretrained("runs/tiny/models/final/judge", output_loading_info=True)
        assert model.config.num_labels == 1 and not info["missing_keys"]
    if recipe == "opd":
        for stage in ("rl", "final"):  # handed on, whether it learned or only taught
            assert (Path("runs/tiny/models") / stage / "teacher" / "config.json").is_file()
    assert (Path("runs/tiny/models/final/policy") / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("recipe", "gain", "final"), [("ppo", 0.4, 0.8), ("dpo", 0.3, 0.6), ("reward_model", 0.4, 0.8), ("opd", 0.4, 0.8)])
def test_every_recipe_learns(miles, recipe, gain, final):
    """From SFT's held-out accuracy of some .3; the whole recipe, a minute or two each."""
    said = miles("run", f"algorithms/{recipe}", "trackers={}")
    assert said.code == 0, said.err
    accuracy = [r["eval/held_out/avg@1"] for r in rows_of(recipe.replace("_", "-")) if "eval/held_out/avg@1" in r]
    assert accuracy[-1] - accuracy[0] >= gain and accuracy[-1] >= final, accuracy
