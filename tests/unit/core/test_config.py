"""The configuration tree: every mistake is a sentence with its place, and what was resolved reads back as the same run."""

from __future__ import annotations

import math
import sys
from typing import Literal

import pytest
import yaml

from miles_core.config import RunConfig, resolve
from miles_core.errors import ConfigError, PluginError
from miles_core.plugins import POINTS, PluginConfig

# ---- one plug-in for each point, with an option each that YAML could lose ------------------------------------------------


class Rows:
    def __init__(self, *, size: int = 10, columns: tuple[str, ...] = ("prompt", "label")): ...


async def play(prompt, context, *, group_size: int = 2, sampling: dict[str, float] | None = None): ...


async def one(trajectory, *, turns: int | None = 4): ...


class World:
    def __init__(self, *, seed: int = 0): ...


def brevity(sample, *, limit: int | None = 40, kind: Literal["words", "tokens"] = "words"): ...


def uniform(group, *, least: float = 0.0): ...


def long(sample, *, most: int = 10): ...


def gae(inputs, *, lam: float = 0.95): ...


def ppo(inputs, *, clip: float = 0.2): ...


def constant(ops, *, by: float = 1.0): ...


class Engine:
    def __init__(self, *, slots: int = 3): ...


class Trainer:
    def __init__(self, *, lr: float = 1e-6, betas: tuple[float, float] = (0.9, 0.95), max_grad_norm: float = 1.0): ...


class Wire:
    def __init__(self, *, bucket: int = 2**20): ...


class Printer:
    def __init__(self, *, every: int = 1): ...


class Judge:
    def __init__(self, *, name: str = "judge"): ...


class Watch:
    def __init__(self, *, limit: float = math.inf): ...


BASE = """\
steps: 3
groups: 2
data: {use: ":Rows", size: 5}
rollout: {use: ":play"}
models:
  policy:
    path: somewhere
    trainer:
      use: ":Trainer"
      lr: 1e-4
    transport: ":Wire"
    losses: {ppo: ":ppo"}
trackers: {}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Write ``r.yaml`` with ``:Name`` standing for this module's plug-in; its path."""
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(text, name="r"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace('":', f'"{__name__}:'))
        return str(path)

    return write


def complaint(path, *overrides):
    with pytest.raises((ConfigError, PluginError)) as found:
        resolve(path, [o.replace("=:", f"={__name__}:") for o in overrides])
    return str(found.value)


# ---- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("stepz: 3", ["r.yaml:14", "unknown key 'stepz'", "Did you mean 'steps'?"]),
        ("sead: 3", ["r.yaml:14", "unknown key 'sead'", "Did you mean 'seed'?"]),
        ("deadlines: {rolout: 3}", ["r.yaml:14", "'deadlines.rolout'", "Did you mean 'rollout'?"]),
        ("every: {evaluate: often}", ["r.yaml:14", "every.evaluate", "valid integer", "'often'"]),
        ("epochs: 0", ["r.yaml:14", "epochs", "greater than 0", "found 0"]),
        ("max_staleness: -1", ["r.yaml:14", "max_staleness", "greater than or equal to 0", "-1"]),
        ("device: gpu", ["r.yaml:14", "device", "'auto', 'cpu' or 'cuda'", "'gpu'"]),
        ("name: my run", ["r.yaml:14", "name", "'my run'"]),
        ("import_from: plugins", ["r.yaml:14", "import_from", "valid list", "'plugins'"]),
        ('rewards: {short: {use: ":brevity", limt: 3}}', ["r.yaml:14", "'rewards.short.limt'", "Did you mean 'limit'?"]),
        ('rewards: {short: {use: ":brevity", wieght: 3}}', ["'rewards.short.wieght'", "Did you mean 'weight'?"]),
        ('rewards: {short: {use: ":brevity", kind: letters}}', ["rewards.short.kind", "'words' or 'tokens'", "'letters'"]),
        ("rewards: {short: {limit: 3}}", ["r.yaml:14", "rewards.short", "'use'"]),
        ('rewards: {short: {use: ":brevit"}}', ["no 'brevit'", "Did you mean 'brevity'?"]),
        ("rewards: {short: {use: brevity}}", ["no reward is called 'brevity'", "module:attribute"]),
        ("rewards: {short: {use: 'not_there:f'}}", ["reward 'not_there:f'", "'not_there' is not installed"]),
        ("evaluators: {a.b: {use: sampled}}", ["r.yaml:14", "evaluators.a.b", "match pattern"]),
        ("stages: {one: {seed: 3}}", ["r.yaml:14", "'stages.one.seed'", "belongs to the whole run"]),
        ("stages: {one: {rollout: {use: trajectories}}}", ["r.yaml:14", "'stages.one.rollout.sampling' is missing"]),
    ],
)
def test_a_wrong_key_or_value_names_its_line_and_what_to_do(recipe, line, expected):
    said = complaint(recipe(BASE + line + "\n"))
    for piece in expected:
        assert piece in said, said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.trainer.lrr=1", ["override model.trainer.lrr=1", "'models.policy.trainer.lrr'", "Did you mean 'lr'?"]),
        ("model.trainer.lr=fast", ["override model.trainer.lr=fast", "trainer.lr", "valid number", "'fast'"]),
        ("model.trainer.betas=[0.9]", ["trainer.betas"]),
        ("rollout.group_sise=3", ["'rollout.group_sise'", "Did you mean 'group_size'?"]),
        ("groups=null", ["override groups=null", "groups", "found None"]),
        ("evaluators=null", ["evaluators: {NAME: null}"]),
        ("model.role=plicy", ["models.policy.role", "'plicy'"]),
        ("modle.path=x", ["'modle'", "Did you mean 'models'?"]),
    ],
)
def test_a_wrong_override_is_quoted(recipe, override, expected):
    said = complaint(recipe(BASE), override)
    for piece in expected:
        assert piece in said, said


def test_what_is_missing_is_asked_for_all_at_once(recipe, tmp_path):
    said = complaint(recipe("models: {policy: {path: x}}\n"))
    assert [line.removeprefix(f"{tmp_path}/r.yaml") for line in said.splitlines()] == [
        ": key 'steps' is missing",
        ": key 'groups' is missing",
        ":1: key 'models.policy.trainer' is missing",
        ": key 'data' is missing",
        ": key 'rollout' is missing",
    ]


def test_a_key_that_a_stage_inherits_is_found_where_it_was_written(recipe):
    staged = BASE + 'stages:\n  one: {}\n  two:\n    models: {policy: {trainer: {use: ":Trainer", lrr: 1}}}\n'
    assert "r.yaml:17: unknown key 'stages.two.models.policy.trainer.lrr'" in complaint(recipe(staged))
    said = complaint(recipe(BASE.replace("lr: 1e-4", "lr: slow") + "stages: {one: {}, two: {}}\n"))
    assert said.count("r.yaml:10: models.policy.trainer.lr:") == 1  # once, though two stages inherit it


# ---- stages and plug-ins -------------------------------------------------------------------------------------------------


def test_stages_inherit_and_differ(recipe):
    config = resolve(recipe(BASE + "stages:\n  one: {steps: 1}\n  two: {groups: 7, models: {policy: {trainer: {lr: 1e-5}}}}\n"))
    one, two = config.stages["one"], config.stages["two"]
    assert (one.steps, one.groups, two.steps, two.groups) == (1, 2, 3, 7)
    assert (one.models["policy"].trainer.lr, two.models["policy"].trainer.lr) == (1e-4, 1e-5)
    assert list(resolve(recipe(BASE)).stages) == ["main"]


def test_what_is_inherited_and_set_to_null_is_left_out(recipe, tmp_path):
    """A stage, a model or a named plug-in that has no part. A stage of one's own that says nothing is one of common settings."""
    base = recipe(
        BASE + 'rewards: {r: {use: ":brevity"}, s: {use: ":brevity"}}\nstages:\n  one: {}\n  two: {rewards: {r: null}}\n  three:\n'
    )
    config = resolve(base)
    assert list(config.stages) == ["one", "two", "three"]
    assert (set(config.stages["one"].rewards), set(config.stages["two"].rewards)) == ({"r", "s"}, {"s"})
    (tmp_path / "above.yaml").write_text(f"extends: {base}\nstages: {{three: null, two: {{models: {{policy: null}}}}}}\n")
    above = resolve(str(tmp_path / "above.yaml"))
    assert list(above.stages) == ["one", "two"] and above.stages["two"].models == {}


def test_options_do_not_leak_into_another_plugin(recipe):
    text = BASE + 'rewards: {r: {use: ":brevity", limit: 3}}\nstages:\n  one: {}\n  two: {rewards: {r: {use: ":other_reward"}}}\n'
    config = resolve(recipe(text))
    assert config.stages["one"].rewards["r"].limit == 3
    assert config.stages["two"].rewards["r"].options() == {"scale": 1.0}
    changed = resolve(recipe(BASE + 'rewards: {r: {use: ":brevity", limit: 3}}\n'), [f"rewards.r.use={__name__}:other_reward"])
    assert changed.stages["main"].rewards["r"].options() == {"scale": 1.0}


def other_reward(sample, *, scale: float = 1.0): ...


def test_an_option_may_be_given_where_the_plugin_stands_alone(recipe):
    config = resolve(recipe(BASE), ["model.transport.bucket=64"])
    assert config.stages["main"].models["policy"].transport.bucket == 64


def test_the_tree_does_not_change_after_validation(recipe):
    config = resolve(recipe(BASE))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


# ---- config.yaml ---------------------------------------------------------------------------------------------------------

EVERYTHING = (
    BASE.replace("lr: 1e-4", "lr: 1e-4\n      betas: [0.8, 0.9]\n      max_grad_norm: .inf")
    .replace(
        'rollout: {use: ":play"}', "rollout: {use: trajectories, sampling: {max_tokens: 4}, generate: GENERATE, environment: ENVIRONMENT}"
    )
    .replace("GENERATE", '{use: ":one", turns: null}')
    .replace("ENVIRONMENT", '{use: ":World", seed: 3}')
    .replace(
        "    path: somewhere\n",
        "    config: {model_type: qwen3, eps: 1e-6, eos_token_id: null}\n    tokenizer: {kind: words, words: [a]}\n",
    )
    .replace("trackers: {}", 'trackers: {p: {use: ":Printer", every: 2}}\nhooks: {w: {use: ":Watch"}}')
    + """\
rewards: {short: {use: ":brevity", limit: null, weight: 1e-3}}
group_filters: {u: {use: ":uniform", least: 0.1}}
sample_filters: {l: ":long"}
evaluators:
  held: {use: sampled, data: {use: ":Rows", size: 3}, sampling: {max_tokens: 8, stop: ["\\n", "é"]}}
  judge: ":Judge"
stages:
  one: {rollout: {use: ":play", sampling: {temperature: 1e0}}, models: {policy: {engine: null, advantage: null}}}
  two:
    models:
      policy:
        engine: {use: ":Engine", slots: 4}
        advantage: ":gae"
        aggregation: {use: ":constant", by: 1e-2}
        kl_reward: {estimator: ":gae", coefficient: 1e-3}
        corrections: {cap: ":long"}
"""
)


def plugins_of(value):
    """Every plug-in in a configuration."""
    if isinstance(value, PluginConfig):
        yield value
    inner = value.values() if isinstance(value, dict) else [getattr(value, n) for n in getattr(type(value), "model_fields", ())]
    for item in inner:
        yield from plugins_of(item)


def test_what_was_resolved_reads_back_as_the_same_run(recipe, tmp_path):
    config = resolve(recipe(EVERYTHING))
    assert {p.point for p in plugins_of(config)} == set(POINTS), "this recipe must use every kind of plug-in"

    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())
    read = RunConfig.from_resolved(written)
    assert read.to_yaml() == config.to_yaml()
    assert read.fingerprint() == config.fingerprint()
    assert read.model_dump() == config.model_dump()

    # What YAML or "leave out None" could have lost: a None that is not the default, infinity, tuples, numbers that look like text.
    policy, reward = read.stages["two"].models["policy"], read.stages["two"].rewards["short"]
    assert reward.limit is None and reward.weight == 1e-3
    assert policy.trainer.max_grad_norm == math.inf and policy.trainer.betas == (0.8, 0.9) and policy.trainer.lr == 1e-4
    assert policy.config == {"model_type": "qwen3", "eps": 1e-6, "eos_token_id": None}
    assert read.hooks["w"].limit == math.inf
    assert read.stages["two"].rollout.generate.turns is None
    assert read.stages["two"].evaluators["held"].sampling.stop == ("\n", "é")
    assert read.stages["one"].models["policy"].engine is None


def test_a_key_that_only_a_later_miles_has_is_no_other_configuration(recipe, tmp_path, monkeypatch):
    """What an earlier one wrote lacks it; its cuts are this run's all the same."""
    config = resolve(recipe(EVERYTHING))
    written = tmp_path / "config.yaml"
    written.write_text(config.to_yaml())

    class Later(RunConfig):
        patience: int = 3

    monkeypatch.setattr("miles_core.config.RunConfig", Later)
    read = Later.from_resolved(written)
    assert read.patience == 3 and read.fingerprint() == config.fingerprint()
    written.write_text(written.read_text() + "patience: 4\n")
    assert Later.from_resolved(written).fingerprint() != config.fingerprint()


def test_the_fingerprint_is_of_what_is_computed(recipe):
    path = recipe(EVERYTHING)
    whole = resolve(path).fingerprint()
    aside = ["deadlines.train=3", "every.checkpoint=1", "keep_checkpoints=7", "runs_dir=else", "rewards.short.timeout_s=5", "trackers={}"]
    assert resolve(path, aside).fingerprint() == whole
    for override in ("seed=1", "groups=3", "rewards.short.weight=2", "stages.two.models.policy.engine.slots=5", "stages.two.epochs=2"):
        assert resolve(path, [override]).fingerprint() != whole, override


def test_a_resumed_run_finds_the_plugins_that_lie_beside_its_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "rewards_beside_recipe.py").write_text("def mine(sample, *, scale: float = 1.0): return scale\n")
    text = BASE.replace('":', f'"{__name__}:') + "rewards: {mine: {use: 'rewards_beside_recipe:mine', scale: 2}}\n"
    (tmp_path / "recipes" / "r.yaml").write_text(text)
    before = sys.path[:]
    config = resolve(str(tmp_path / "recipes" / "r.yaml"))
    (tmp_path / "config.yaml").write_text(config.to_yaml())

    sys.path[:] = before  # as in the process of `miles resume`
    sys.modules.pop("rewards_beside_recipe")
    read = RunConfig.from_resolved(tmp_path / "config.yaml")
    assert read.stages["main"].rewards["mine"].scale == 2
    sys.modules.pop("rewards_beside_recipe")


@pytest.mark.parametrize(
    ("text", "expected"), [(None, "no run directory"), ("a: [", "not valid YAML"), ("[]", "list"), ("seed: x", "seed")]
)
def test_a_run_whose_config_cannot_be_read(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected) as found:
        RunConfig.from_resolved(tmp_path / "config.yaml")
    assert str(tmp_path) in str(found.value)


def test_config_yaml_holds_the_defaults_too(recipe):
    """Defaults of a later version must not change a run that is resumed."""
    data = yaml.safe_load(resolve(recipe(BASE)).to_yaml())
    stage = data["stages"]["main"]
    assert (
        stage["max_staleness"] == 0
        and stage["deadlines"]["group"] == 900.0
        and stage["models"]["policy"]["trainer"]["max_grad_norm"] == 1.0
    )


def test_a_run_may_go_on_on_another_number_of_ranks():
    assert resolve("quickstart", ["models.policy.trainer.ranks=2"]).fingerprint() == resolve("quickstart").fingerprint()


def test_a_run_that_a_gate_stopped_may_go_on_with_a_wider_one():
    same = resolve("quickstart", ["models.policy.trainer.gates.mismatch=0.1"]).fingerprint()
    assert same == resolve("quickstart").fingerprint() != resolve("quickstart", ["models.policy.trainer.max_grad_norm=2"]).fingerprint()
