"""LoRA from the command line: an adapter is trained, published, saved, exported, and what comes after begins with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures.runs import finish
from safetensors.numpy import load_file, save_file

LORA = """
extends: lora
trackers: {}
models: {policy: {config: {hidden_size: 32, intermediate_size: 64, head_dim: 8}}}
stages:
  sft: {steps: 2, groups: 8, models: {policy: {trainer: {warmup_steps: 0}}}}
  rl:
    steps: 3
    groups: 2
    rollout: {group_size: 4, sampling: {max_tokens: 8}}
    rewards: {short: {use: length, per_token: 0.1, max_tokens: 2}}
    evaluators: {held_out: {prompts: 4}}
    every: {checkpoint: 1}
    models: {policy: {lora: {rank: 4}, trainer: {lr: 0.01, warmup_steps: 0}}}
"""
AFTERWARDS = """
extends: mini_lora.yaml
groups: 2
rollout: {use: trajectories, group_size: 4, environment: {use: calculator}, sampling: {max_tokens: 8, temperature: 1.0}}
stages:
  sft: {rollout: {use: read}}
  more:
    steps: 2
    rewards: {short: {use: length, per_token: 0.1, max_tokens: 2}}
    models:
      policy:
        lora: {rank: 4}
        engine: local
        advantage: grpo
        losses: {ppo: {use: ppo_clip, old: current}, kl: {use: kl, coefficient: 0.1}}
        trainer: {lr: 0.01}
      reference: {role: reference, trainer: torch}
  whole:
    steps: 1
    models: {policy: {lora: null, engine: local, advantage: grpo, losses: {ppo: {use: ppo_clip, old: current}}, trainer: {lr: 1.0e-9}}}
"""
ADAPTER_BYTES = 2 * 4 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
"""Layers, float32, rank, and the sides of queries and outputs, keys and values, and the three matrices of the MLP."""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run: two steps of SFT, three of GRPO with an adapter, bit by bit reproducible."""
    return finish(LORA, tmp_path_factory.mktemp("adapted"), "name=lora", "numerics=bitwise")


@pytest.fixture
def recipes(miles, tmp_path: Path):
    """``miles`` with this file's recipes beside it."""
    (tmp_path / "mini_lora.yaml").write_text(LORA)
    (tmp_path / "afterwards.yaml").write_text(AFTERWARDS)
    return miles


def rows_of(run: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


def logits_of(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(20).view(2, 10)).logits.numpy()


def test_a_publish_moves_the_adapter_and_every_token_has_its_bits(adapted: Path):
    rows = rows_of(adapted, "rl")
    assert [row["publish/bytes"] for row in rows] == [ADAPTER_BYTES, 0, 0, 0]
    assert [row["mismatch/max_abs"] for row in rows[1:]] == [0.0] * 3
    assert all(row["grad_norm"] > 0 for row in rows[1:])


def test_the_base_stays_and_the_end_is_a_peft_directory(adapted: Path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final, base = adapted / "models" / "final" / "policy", adapted / "models" / "rl" / "policy"
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert sum(tensor.nbytes for tensor in load_file(final / "adapter_model.safetensors").values()) == ADAPTER_BYTES
    assert not (final / "model.safetensors").exists() and AutoTokenizer.from_pretrained(final).encode("47 + 58 ?")
    with_adapter = logits_of(AutoPeftModelForCausalLM.from_pretrained(final, dtype="float32"))
    without = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype="float32"))
    assert np.abs(with_adapter - without).max() > 1e-3


def test_exports(recipes, adapted: Path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    said = recipes("export", str(adapted), "adapter")
    assert said.code == 0, said.sentence
    card = Path("adapter/README.md").read_text()
    assert "library_name: peft" in card and "AutoPeftModelForCausalLM" in card and "base_model:" not in card
    named = Path(shutil.copytree(adapted, "named")) / "models" / "final" / "policy" / "adapter_config.json"
    named.write_text(json.dumps(json.loads(named.read_text()) | {"base_model_name_or_path": "owner/name"}))
    assert recipes("export", "named", "of_hub").code == 0 and "base_model: owner/name" in Path("of_hub/README.md").read_text()
    whole = recipes("export", str(adapted), "whole", "--merge")
    assert whole.code == 0, whole.sentence
    assert "library_name: transformers" in Path("whole/README.md").read_text() and not Path("whole/adapter_config.json").exists()
    apart = logits_of(AutoPeftModelForCausalLM.from_pretrained("adapter", dtype="float32"))
    np.testing.assert_allclose(logits_of(AutoModelForCausalLM.from_pretrained("whole", dtype="float32")), apart, atol=1e-5)
    assert recipes("export", str(adapted), "of_cut", "--step", "5").code == 0
    for file in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert Path("of_cut", file).read_bytes() == Path("adapter", file).read_bytes(), file


def test_what_has_no_adapter_is_not_merged(recipes, finished_run: Path):
    said = recipes("export", str(finished_run), "whole", "--merge")
    assert said.code == 1 and "trained without lora: its weights are whole already; leave --merge out" in said.sentence
    assert not Path("whole").exists()


def test_a_run_that_was_moved_finds_its_model(recipes, adapted: Path, tmp_path: Path):
    run = Path(shutil.copytree(adapted, tmp_path / "copy"))
    file = run / "models" / "final" / "policy" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(adapted), "/somewhere/else"))
    assert recipes("export", str(run), "adapter").code == 0
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(run / "models" / "rl" / "policy")
    assert recipes("export", str(run), "whole", "--merge").code == 0
    assert recipes("export", str(adapted), "same", "--merge").code == 0
    assert Path("whole/model.safetensors").read_bytes() == Path("same/model.safetensors").read_bytes()
    weights = run / "models" / "rl" / "policy" / "model.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    said = recipes("export", str(run), "another", "--merge")
    assert said.code == 1 and "belongs to another model: it was trained beside other weights" in said.sentence


def test_a_resumed_run_goes_on_to_the_bit(recipes, adapted: Path, tmp_path: Path):
    run = Path(shutil.copytree(adapted, tmp_path / "copy"))
    shutil.rmtree(run / "models" / "final")
    shutil.rmtree(run / "checkpoints" / "step-000005")
    said = recipes("resume", str(run))
    assert said.code == 0, said.sentence
    one, other = (load_file(r / "models" / "final" / "policy" / "adapter_model.safetensors") for r in (adapted, run))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(other[name], tensor, name)


def test_later_stages_begin_with_it(recipes, tmp_path: Path):
    """One goes on with the adapter, and its reference is what that begins with; one merges it and trains all weights."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    said = recipes("run", "afterwards.yaml", "runs_dir=runs", "name=run")
    assert said.code == 0, said.sentence
    run = tmp_path / "runs" / "run"
    more = [row for row in rows_of(run, "more") if "loss" in row]
    assert abs(more[0]["loss/kl"]) < 1e-12 < more[1]["loss/kl"]
    bases = {
        json.loads((run / "models" / s / "policy" / "adapter_config.json").read_text())["base_model_name_or_path"]
        for s in ("more", "whole")
    }
    assert bases == {str(run / "models" / "rl" / "policy")}
    assert (run / "models" / "more" / "reference").is_dir() and not (run / "models" / "whole" / "reference").exists()  # holds no model
    assert (run / "models" / "final" / "policy" / "config.json").is_file()
    handed_on = logits_of(AutoPeftModelForCausalLM.from_pretrained(run / "models" / "whole" / "policy", dtype="float32"))
    end = logits_of(AutoModelForCausalLM.from_pretrained(run / "models" / "final" / "policy", dtype="float32"))
    np.testing.assert_allclose(end, handed_on, atol=1e-5)


@pytest.mark.parametrize(
    "overrides, trained",
    [
        (["models.policy.path={final}", "models.policy.lora={{}}"], "adapter"),
        (["models.policy.path={base}", "models.policy.lora.path={final}"], "adapter"),
        (["models.policy.path={final}"], "all"),
    ],
)
def test_a_run_begins_with_an_adapter(recipes, adapted: Path, tmp_path: Path, overrides: list[str], trained: str):
    (tmp_path / "go_on.yaml").write_text("""
name: go_on
trackers: {}
device: cpu
steps: 1
groups: 2
data: {use: calculator_problems, size: 100}
rollout: {use: trajectories, group_size: 4, environment: {use: calculator}, sampling: {max_tokens: 8, temperature: 1.0}}
rewards: {short: {use: length, per_token: 0.1, max_tokens: 2}}
models: {policy: {engine: local, trainer: {use: torch, lr: 1.0e-9}, advantage: grpo, losses: {ppo: {use: ppo_clip, old: current}}}}
""")
    places = {"final": adapted / "models" / "final" / "policy", "base": adapted / "models" / "rl" / "policy"}
    said = recipes("run", "go_on.yaml", "runs_dir=runs", *(o.format(**places) for o in overrides))
    assert said.code == 0, said.sentence
    end = tmp_path / "runs" / "go_on" / "models" / "final" / "policy"
    assert (end / "adapter_config.json").is_file() == (trained == "adapter") == (not (end / "config.json").is_file())
    if trained == "adapter":
        before, after = (load_file(d / "adapter_model.safetensors") for d in (places["final"], end))
        assert all(np.abs(after[name] - tensor).max() < 1e-7 for name, tensor in before.items())
        assert json.loads((end / "adapter_config.json").read_text())["base_model_name_or_path"] == str(places["base"])


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            ["stages.rl.models.policy.trainer=megatron"],
            "trainer 'megatron' takes no adapter (lora); trainer torch and engine local do",
        ),
        (["stages.rl.models.policy.engine=sglang", "stages.rl.models.policy.transport=tensor"], "engine 'sglang' takes no adapter (lora)"),
        (["stages.rl.models.critic={role: critic, trainer: torch, lora: {}}"], "lora is for policies, this is a critic; leave it out"),
        (["stages.rl.models.policy.lora.path=x"], "the adapter in path brings its own rank; leave that out"),
        (["stages.rl.models.policy.lora.rank=0"], "stages.rl.models.policy.lora.rank"),
        (["stages.rl.models.policy.lora.targets=[]"], "list should have at least 1 item"),
        (["stages.rl.models.policy.lora={path: dora, rank: null}"], "has use_dora: true, which is more than plain LoRA"),
        (["stages.sft.models.policy={path: plain, config: null, lora: {rank: 3}}"], "brings its own rank; leave that out"),
        (["stages.sft.models.policy.lora={rank: 8}"], "lora is another than in the stage before, which hands its adapter on"),
    ],
)
def test_what_cannot_be_is_refused(recipes, adapted: Path, tmp_path: Path, overrides: list[str], sentence: str):
    made = {"plain": {}, "dora": {"use_dora": True}}
    for name, fields in made.items():
        shutil.copytree(adapted / "models" / "final" / "policy", tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    said = recipes("check", "mini_lora.yaml", *overrides)
    assert said.code == 1 and sentence in said.sentence


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["stages.rl.models.policy.lora={path: nowhere/at/all, rank: null}"], "'nowhere/at/all' is neither a directory nor a hub id"),
        (["stages.rl.models.reference={role: reference, trainer: torch, path: lost}"], "names 'nowhere/at/all' as its model"),
    ],
)
def test_what_a_later_stage_would_miss_is_found_at_once(recipes, adapted: Path, overrides: list[str], sentence: str):
    shutil.copytree(adapted / "models" / "final" / "policy", "lost")
    said = json.loads(Path("lost/adapter_config.json").read_text()) | {"base_model_name_or_path": "nowhere/at/all"}
    Path("lost/adapter_config.json").write_text(json.dumps(said))
    said = recipes("run", "mini_lora.yaml", "runs_dir=runs", *overrides)
    assert said.code == 1 and sentence in said.sentence and not Path("runs").exists()


def test_the_plan_says_what_is_trained(recipes):
    said = recipes("check", "mini_lora.yaml")
    assert said.code == 0 and "trainer torch with lora (rank 4)" in " ".join(said.out.replace("│", " ").split())


def test_without_peft_it_is_a_sentence(recipes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("miles_core.lora.find_spec", lambda name: None)
    said = recipes("run", "mini_lora.yaml", "runs_dir=runs")
    assert (
        said.code == 1 and "LoRA needs peft, which is not installed; pip install 'miles-train[lora]' 'miles-rollout[lora]'" in said.sentence
    )
    assert not Path("runs").exists()


def test_an_adapter_whose_model_is_gone_is_a_sentence(recipes, adapted: Path, tmp_path: Path):
    moved = Path(shutil.copytree(adapted / "models" / "final" / "policy", tmp_path / "moved"))
    said = json.loads((moved / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/gone/away"}
    (moved / "adapter_config.json").write_text(json.dumps(said))
    overrides = [
        "stages.sft.models.policy.config=null",
        "stages.sft.models.policy.tokenizer=null",
        f"stages.sft.models.policy.path={moved}",
    ]
    said = recipes("run", "mini_lora.yaml", "runs_dir=runs", *overrides)
    assert said.code == 1 and "names '/gone/away' as its model" in said.sentence
    assert "give the model as path and the adapter as lora.path" in said.sentence


@pytest.mark.slow
def test_the_quick_start_with_an_adapter_learns(recipes, tmp_path: Path):
    """In the steps that the quick start takes with all weights, and by the same measure."""
    said = recipes("run", "lora", "runs_dir=runs", "trackers={}")
    assert said.code == 0, said.sentence
    found = [row["eval/held_out/avg@1"] for row in rows_of(tmp_path / "runs" / "lora", "rl") if "eval/held_out/avg@1" in row]
    assert found[-1] >= 0.8 and found[-1] - found[0] >= 0.4
