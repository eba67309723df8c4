"""``miles check``: settings that are right one by one and wrong together, found without torch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
from fixtures.training import COMMON

from miles_core.check import check, missing
from miles_core.config import RunConfig
from miles_core.errors import ConfigError
from miles_core.plugins import PluginConfig


def rows(): ...


def engine(): ...


def trainer(*, lr: float = 1e-6): ...


def wire(): ...


def reward(sample): ...


def play(prompt, context): ...


def clipped_values(inputs, *, clip: float = 0.2): ...


clipped_values.__miles__ = {"needs": {"values", "returns"}, "head": "scalar"}


def penalised(inputs, *, by: float = 0.1): ...


penalised.__miles__ = {"needs": {"ref_logprobs"}}


def gae(inputs): ...


gae.__miles__ = {"needs": {"values"}, "gives": {"advantages", "returns"}}


class Fussy(PluginConfig):
    """A trainer with something to say about the stage."""

    point = "trainer"
    target = "nowhere:at_all"

    def problems(self, stage):
        return [f"it does not like {stage.groups} groups"]


HERE = f"{__name__}:"

CRITIC = {"role": "critic", "trainer": HERE + "trainer", "transport": HERE + "wire", "losses": {"v": HERE + "clipped_values"}}
REFERENCE = {"role": "reference", "trainer": HERE + "trainer", "transport": HERE + "wire"}
GOOD = {
    "steps": 3,
    "groups": 2,
    "data": HERE + "rows",
    "rollout": {"use": "trajectories", "group_size": 4, "sampling": {"max_tokens": 8}},
    "rewards": {"r": HERE + "reward"},
    "models": {
        "policy": {
            "path": "owner/model",
            "trainer": HERE + "trainer",
            "transport": HERE + "wire",
            "engine": HERE + "engine",
            "advantage": "grpo",
            "losses": {"ppo": {"use": "ppo_clip"}},
        }
    },
}


def problems(changes=None, stage="main"):
    """What check says of GOOD with ``{"a.b": value}`` set; a value of ``...`` takes the key out."""
    try:
        check(RunConfig.model_validate(recipe(changes, stage)))
    except ConfigError as error:
        return str(error).splitlines()
    return []


def recipe(changes=None, stage="main"):
    tree = copy.deepcopy(GOOD)
    for path, value in (changes or {}).items():
        *way, last = path.split(".")
        node = tree
        for key in way:
            node = node.setdefault(key, {})
        if value is ...:
            node.pop(last)
        else:
            node[last] = value
    return {"name": "x", "trackers": {}, "stages": {stage: tree}}


def test_a_good_recipe_is_good():
    assert problems() == []
    assert problems({"models.ref": REFERENCE, "models.policy.losses.kl": HERE + "penalised"}) == []
    assert problems({"models.critic": CRITIC, "models.policy.advantage": HERE + "gae"}) == []
    assert problems({"models.ref": REFERENCE | {"path": "elsewhere", "of": "policy"}}) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 0}, ["steps is 0", "nothing would be trained", "at least 1"]),
        ({"models": {}}, ["no policy", "role: policy"]),
        ({"models": {"critic": CRITIC}}, ["no policy", "role: policy"]),
        ({"models.policy.config": {"model_type": "qwen3"}}, ["model policy", "path and config are both given"]),
        ({"models.policy.path": ...}, ["model policy", "neither path nor config is given"]),
        ({"models.policy.path": ..., "models.policy.config": {"model_type": "x"}}, ["model policy", "needs a tokenizer"]),
        ({"models.policy.engine": ...}, ["model policy", "no engine", "engine: {use: local}"]),
        ({"models.policy.losses": {}}, ["model policy", "no losses"]),
        ({"models.policy.advantage": ...}, ["loss 'ppo_clip' needs 'advantages'", "Add advantage"]),
        ({"models.policy.losses.kl": HERE + "penalised"}, ["needs 'ref_logprobs'", "role: reference"]),
        ({"models.policy.advantage": HERE + "gae"}, ["needs 'values'", "role: critic"]),
        ({"models.critic": CRITIC}, ["model critic", "needs 'returns'"]),
        ({"rollout.group_size": 1}, ["advantage 'grpo' needs 'groups'", "group_size to at least 2"]),
        ({"rewards": {}}, ["advantage 'grpo' needs 'rewards'", "Add rewards"]),
        ({"rewards.environment": HERE + "reward"}, ["rewards.environment", "give the reward another"]),
        ({"rollout": HERE + "play"}, ["needs 'logprobs'", "@miles.rollout(gives="]),
        ({"rollout": "read"}, ["needs 'logprobs'"]),
        ({"rollout.sampling.temperature": 0}, ["temperature is 0", "greedy"]),
        ({"rollout.sampling.top_p": 0.9}, ["restricts the support", "top_p"]),
        ({"rollout.sampling.top_k": 50}, ["restricts the support", "top_k"]),
        ({"rollout.sampling.min_p": 0.1}, ["restricts the support", "min_p"]),
        ({"models.policy.losses.ppo.old": "current", "epochs": 2}, ["old: current", "one optimizer step", "recompute"]),
        ({"models.policy.losses.ppo.old": "current", "minibatches": 2}, ["old: current", "one optimizer step"]),
        ({"minibatches": 9}, ["minibatches is 9", "8 trajectories"]),
        ({"models.ref": REFERENCE | {"of": "plicy"}}, ["model ref", "'plicy'", "no policy (policy)"]),
        ({"models.critic": CRITIC | {"of": "plicy"}}, ["model critic", "'plicy'", "no policy (policy)"]),
        ({"models.second": GOOD["models"]["policy"], "models.ref": REFERENCE}, ["model ref", "of is missing", "policy, second"]),
        ({"models.policy.trainer": Fussy(use="fussy")}, ["trainer 'fussy'", "does not like 2 groups"]),
        (
            {"rollout": "read", "evaluators.e": {"use": "sampled", "data": HERE + "rows"}},
            ["evaluators sampled", "'trajectories', not 'read'"],
        ),
    ],
)
def test_what_does_not_go_together_is_said_with_what_to_do(changes, expected):
    said = problems(changes)
    assert said, "nothing was found"
    assert any(all(piece in line for piece in expected) for line in said), said
    assert all(line.startswith("stage main: ") for line in said)


PPO = {"use": "ppo_clip"}
TIS = {"tis": {"use": "tis"}}
PAIRS = {"losses": {"d": {"use": "dpo"}}, "advantage": "preference", "aggregation": "sequence_mean"}
JUDGE = {"role": "reward", "path": "owner/model", "trainer": HERE + "trainer", "transport": HERE + "wire"}
VALUE_CRITIC = CRITIC | {"losses": {"v": {"use": "value_clip"}}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (  # a KL divergence twice
            {"models.ref": REFERENCE, "models.policy.kl_reward": {"coefficient": 0.1}, "models.policy.losses.kl": "kl"},
            ["kl_reward and a kl loss are both given", "keep one"],
        ),
        ({"models.policy.kl_reward": {"coefficient": 0.1}}, ["kl_reward needs 'ref_logprobs'", "role: reference"]),
        ({"models.policy.losses.kl": "kl"}, ["loss 'kl' needs 'ref_logprobs'", "role: reference"]),
        # a correction that has nothing to compare
        ({"models.policy.corrections": TIS, "models.policy.losses.ppo": PPO | {"old": "rollout"}}, ["old: rollout", "use old: recompute"]),
        ({"models.policy.corrections": TIS, "models.policy.losses.ppo": PPO | {"old": "current"}}, ["old: current", "use old: recompute"]),
        ({"models.policy.corrections": TIS, "rollout": HERE + "play"}, ["corrections compare with the rollout's 'logprobs'"]),
        ({"models.policy.corrections": TIS, "models.policy.advantage": ...}, ["corrections weigh policy-gradient terms"]),
        # a ratio for a whole sequence, advantages for each token
        (
            {"models.critic": VALUE_CRITIC, "models.policy.advantage": "gae", "models.policy.losses.ppo": {"use": "gspo"}},
            ["loss 'gspo'", "advantage 'gae' differs between tokens", "token_advantages"],
        ),
        ({"models.policy.advantage": "gae"}, ["advantage 'gae' needs 'values'", "role: critic"]),
        ({"models.critic": VALUE_CRITIC}, ["model critic", "needs 'returns'", "gae"]),
        # pairs
        ({"models.policy": GOOD["models"]["policy"] | PAIRS, "models.ref": REFERENCE}, ["needs 'pairs'", "read_pairs"]),
        (
            {"models.policy": GOOD["models"]["policy"] | PAIRS | {"aggregation": "token_mean"}, "models.ref": REFERENCE},
            ["loss 'dpo' is one number a pair", "sequence_mean"],
        ),
        (
            {"models.policy": GOOD["models"]["policy"] | PAIRS | {"advantage": "reinforce_pp"}, "models.ref": REFERENCE},
            ["loss 'dpo'", "'reinforce_pp' differ between tokens", "preference"],
        ),
        # heads
        ({"models.policy.losses.v": "value_clip"}, ["loss 'value_clip' belongs to a critic or reward model, this is a policy"]),
        ({"models.judge": JUDGE | {"losses": {"l": {"use": "ppo_clip"}}}}, ["'ppo_clip' belongs to a policy, this is a reward"]),
        ({"models.teacher": REFERENCE | {"role": "teacher"}, "models.policy.advantage": "opd"}, ["a teacher needs weights of its own"]),
        ({"models": {"judge": {k: v for k, v in JUDGE.items() if k != "path"}}}, ["model judge", "names no model that this stage builds"]),
        (
            {"models.judge": JUDGE | {"losses": {"l": {"use": "bradley_terry"}}}},
            ["policies and a reward model that learns (policy, judge)"],
        ),
        ({"models.critic": CRITIC | {"losses": {"v": HERE + "penalised"}}}, ["this is a critic", "@miles.loss(head='scalar')"]),
        ({"models.policy.frozen_steps": 3}, ["frozen_steps is 3 of 3 steps"]),
        ({"models.policy.advantage": "opd"}, ["advantage 'opd' needs 'teacher_logprobs'", "role: teacher"]),
        ({"models.policy.advantage": {"use": "opd", "base": "gae"}}, ["'values'", "role: critic"]),
        ({"models.policy.advantage": {"use": "pass_at_k", "k": 9}}, ["k is 9, but groups have 4"]),
        ({"models.policy.losses.ppo": {"use": "clip_cov", "old": "current"}}, ["loss 'clip_cov'", "recompute or rollout"]),
    ],
)
def test_algorithms_that_are_right_alone_and_wrong_together_are_refused(changes, expected):
    said = problems(changes)
    assert any(all(piece in line for piece in expected) for line in said), said


@pytest.mark.parametrize(
    "changes",
    [
        {"models.ref": REFERENCE, "models.policy.kl_reward": {"coefficient": 0.1}},
        {"models.ref": REFERENCE, "models.policy.losses.kl": {"use": "kl", "coefficient": 0.1, "estimator": "k2"}},
        {"models.policy.corrections": {"tis": {"use": "tis"}, "veto": "veto"}},
        {
            "models.critic": VALUE_CRITIC,
            "models.policy.advantage": "gae",
            "models.policy.losses.ppo": {"use": "gspo", "token_advantages": True},
        },
        {"models.critic": VALUE_CRITIC, "models.policy.advantage": "gae", "models.policy.frozen_steps": 2},
        {"rollout": "read_pairs", "models.policy": GOOD["models"]["policy"] | PAIRS, "models.ref": REFERENCE},
        {"rollout.group_size": 2, "models.policy": GOOD["models"]["policy"] | PAIRS, "models.ref": REFERENCE},
        {"models.teacher": REFERENCE | {"role": "teacher", "path": "strong"}, "models.policy.advantage": "opd"},
        {
            "rollout": "read_pairs",
            "models": {
                "judge": JUDGE | {"losses": {"b": {"use": "bradley_terry"}}, "advantage": "preference", "aggregation": "sequence_mean"}
            },
        },
    ],
)
def test_combinations_that_make_sense_are_left_alone(changes):
    assert problems(changes) == []


def test_old_current_is_right_for_one_optimizer_step():
    assert problems({"models.policy.losses.ppo.old": "current"}) == []


def test_an_environment_gives_rewards():
    assert problems({"rewards": {}, "rollout.environment": HERE + "World"}) == []


class World: ...


def test_greedy_evaluation_is_allowed():
    held_out = {"use": "sampled", "data": HERE + "rows", "sampling": {"max_tokens": 8, "temperature": 0}}
    assert problems({"evaluators.held_out": held_out}) == []


# The megatron trainer


def megatron(**options):
    return {"use": "megatron", **options}


THIRDS = {"models.policy.trainer": megatron(parallel={"tensor": 3})}
UNEVEN = "3 tensor-parallel ranks cannot share 4 attention heads evenly; choose a number of tensor-parallel ranks that divides 4"
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    **COMMON,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def test_megatrons_layout_must_divide_a_model_that_is_built_from_scratch():
    scratch = {"models.policy.path": ..., "models.policy.tokenizer": {"kind": "words", "words": ["a"]}}
    config = {"model_type": "qwen3", "num_attention_heads": 4, "num_hidden_layers": 3, "num_experts": 6}
    changes = scratch | {"models.policy.config": config}
    assert problems(changes | THIRDS) == [f"stage main: model policy: trainer 'megatron': {UNEVEN}"]
    assert problems(changes | {"models.policy.trainer": megatron(parallel={"tensor": 2, "expert": 2})}) == []
    (said,) = problems(changes | {"models.policy.trainer": megatron(parallel={"data": 2, "expert": 3})})
    assert "3 expert-parallel ranks do not divide the tensor × context × data = 2 ranks" in said


def test_megatron_needs_a_table_for_a_model_that_is_built_from_scratch():
    """Said before an earlier stage has trained it."""
    changes = {"models.policy.path": ..., "models.policy.tokenizer": {"kind": "words", "words": ["a"]}}
    changes |= {"models.policy.config": {"model_type": "llama"}, "models.policy.trainer": megatron()}
    (said,) = problems(changes)
    assert "config: model_type says 'llama', for which the megatron trainer has no table; known are qwen3, qwen3_moe. Add one" in said


def test_megatrons_layout_must_divide_the_model_at_a_path(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    changes = {"models.policy.path": str(tmp_path)}

    def of_the_layout(changes):
        return [said for said in problems(changes) if "has no model" not in said]  # weights there are none

    uneven, heads = of_the_layout(changes | THIRDS)
    assert uneven == f"stage main: model policy: trainer 'megatron': {UNEVEN}"
    assert "3 tensor-parallel ranks cannot share 2 key/value heads" in heads
    assert of_the_layout(changes | {"models.policy.trainer": megatron(parallel={"tensor": 2})}) == []
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (said,) = of_the_layout(changes | {"models.policy.trainer": megatron()})
    assert "LlamaForCausalLM" in said and "known are" in said


def test_megatron_trains_no_critic():
    (said,) = problems({"models.critic": VALUE_CRITIC | {"trainer": megatron()}, "models.policy.advantage": "gae"})
    assert said == "stage main: model critic: trainer 'megatron': it has no scalar head yet, which a critic needs; use trainer: torch"


def test_another_megatron_core_is_found_before_anything_is_built(monkeypatch):
    config, installed = RunConfig.model_validate(recipe({"models.policy.trainer": megatron()})), {}
    monkeypatch.setattr("importlib.metadata.version", installed.__getitem__)
    installed["megatron-core"] = "0.16.1"
    assert missing(config) == []
    installed["megatron-core"] = "0.17.0"
    expected = "megatron-core is 0.17.0, Miles knows 0.16.1; pip install megatron-core==0.16.1"
    assert missing(config) == [f"trainer 'megatron': {expected}"]


@pytest.mark.parametrize("use", ["megatron", "torch"])
def test_there_is_nothing_to_compare_without_replay(use):
    with pytest.raises(ConfigError, match=r"models\.policy\.trainer.*compare_routing compares .*set routing_replay: true"):
        RunConfig.from_mapping(recipe({"models.policy.trainer": {"use": use, "compare_routing": True, "routing_replay": False}}))


# The SGLang engine

LOCAL = "http://127.0.0.1:30000"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"arguments": {"port": 30000}}, "argument 'port' of SGLang cannot be given: Miles sets"),
        ({"arguments": {"api-key": "secret"}}, "argument 'api-key' of SGLang cannot be given"),
        ({"urls": ["127.0.0.1:30000"]}, "'127.0.0.1:30000' is no address of a server; expected e.g."),
        ({"urls": ["http://127.0.0.1"]}, "is no address of a server"),
        ({"urls": ["http://127.0.0.1:70000"]}, "is no address of a server"),
        ({"urls": ["http://:30000"]}, "is no address of a server"),
        ({"urls": [LOCAL, LOCAL + "/"]}, "a server is named twice"),
        ({"urls": [LOCAL, "http://10.0.0.2:30000"]}, r"http://10.0.0.2:30000 is not on this machine; .* set key_variable"),
        ({"urls": [LOCAL], "servers": 2}, "servers at urls are not started here; leave servers out"),
        ({"key_variable": "KEY"}, "key_variable is for servers at urls"),
    ],
)
def test_options_of_the_sglang_engine_that_cannot_work(options, expected):
    with pytest.raises(ConfigError, match=rf"models\.policy\.engine.*{expected}"):
        RunConfig.from_mapping(recipe(sglang(**options)))


def sglang(**options):
    return {"models.policy.engine": {"use": "sglang", **options}}


@pytest.mark.parametrize("options", [{"urls": [LOCAL, "http://localhost:30001"]}, {"urls": ["https://other:443"], "key_variable": "KEY"}])
def test_servers_that_run_already_need_nothing_here(options):
    config = RunConfig.from_mapping(recipe(sglang(**options)))
    assert missing(config) == []


def test_an_interpreter_without_sglang_is_found_before_anything_is_built(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text("""#!/bin/sh\necho '{"python": "3.12.0", "sglang": null, "torch": "2.9.1", "transformers": "5.0"}'\n""")
    interpreter.chmod(0o755)
    (said,) = missing(RunConfig.from_mapping(recipe(sglang(interpreter=str(interpreter)))))
    assert said.startswith(f"rollout_engine 'sglang': SGLang's interpreter {interpreter} has no sglang. ")


def test_all_problems_are_said_at_once():
    said = problems({"steps": 0, "models.policy.losses": {}, "rollout.sampling.temperature": 0})
    assert len(said) == 3


def test_a_stage_may_not_be_called_like_the_directory_of_the_last_weights():
    assert "stage final" in problems(stage="final")[0]


def test_check_needs_no_torch():
    code = (
        "import sys; from miles_core.config import resolve; from miles_core.check import check; check(resolve('quickstart'));"
        "bad = [m for m in ('torch', 'transformers', 'ray', 'sglang') if m in sys.modules]; assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_that_is_not_here_is_lacking_and_one_that_is_spoiled_is_a_problem(tmp_path):
    """A recipe may be checked on another machine than it runs on; what lies here must be whole."""
    nowhere = {"models.policy.path": str(tmp_path / "nowhere")}
    assert problems(nowhere) == []
    assert missing(RunConfig.model_validate(recipe(nowhere))) == [
        f"model path '{tmp_path}/nowhere' is neither a directory nor a hub id of the form owner/name"
    ]
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    (said,) = problems({"models.policy.path": str(tmp_path)})
    assert said.startswith(f"stage main: model policy: {tmp_path} has no model.safetensors")
