"""``miles export``: the weights that were saved, as transformers reads them, and a card that says where they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from miles_core.config import RunConfig
from miles_core.errors import CheckpointError, RunError
from miles_core.inspection.card import model_card
from miles_core.inspection.export import export
from miles_core.run_dir import RunDir


@pytest.fixture
def own_run(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "own"))


def card_of(directory: Path) -> tuple[dict, str]:
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_end_of_a_run_with_its_tokenizer_and_facts(miles, finished_run):
    said = miles("export", str(finished_run), "model")
    assert said.code == 0 and "weights after step 5 (the end of the run)" in said.out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
    saved = load_file(finished_run / "models" / "final" / "policy" / "model.safetensors")
    for name, tensor in saved.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), tensor)
    assert tokenizer.decode(tokenizer.encode("47 + 58 - 12 ?")) == "47 + 58 - 12 ?"
    front, text = card_of(Path("model"))
    assert front["library_name"] == "transformers" and "base_model" not in front
    last = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()][-1]
    for fact in ("mini, seed 0", '"model_type": "qwen3"', "sft: 2 steps, rl: 3 steps", "advantage grpo, loss ppo_clip by token_mean"):
        assert fact in text
    assert f"| reward | {last['reward']:.4g} | 5 |" in text and f"| mismatch/mean_abs | {last['mismatch/mean_abs']:.4g} | 5 |" in text
    assert "| eval/held_out/avg@1 |" in text and "torch 2" in text


def test_a_checkpoint_gives_the_weights_it_holds(miles, finished_run):
    before = sorted(str(p) for p in finished_run.rglob("*"))
    said = miles("export", str(finished_run), "model", "--step", "4", "--json")
    assert said.code == 0, said.err
    cut = finished_run / "checkpoints" / "step-000004"
    assert json.loads(said.out) == {"directory": "model", "step": 4, "stage": "rl", "from": str(cut)}
    masters, exported = load_file(cut / "models" / "policy" / "weights.safetensors"), load_file("model/model.safetensors")
    assert exported.keys() <= masters.keys()
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, masters[name])
    _, text = card_of(Path("model"))
    assert "step 4 of 5" in text and "sft: 2 steps, rl: 2 of 3 steps" in text and "| 5 |" not in text
    assert sorted(str(p) for p in finished_run.rglob("*")) == before and Path("model/tokenizer.json").is_file()


def test_a_run_that_is_not_finished_gives_its_newest_checkpoint(miles, own_run):
    shutil.rmtree(own_run / "models" / "final")
    said = miles("export", str(own_run), "deep/model")
    assert said.code == 0 and "weights after step 5 (checkpoint step-000005)" in said.out and Path("deep/model/config.json").is_file()


def test_an_export_overwrites_nothing(miles, finished_run):
    Path("model").mkdir()
    said = miles("export", str(finished_run), "model")
    assert said.code == 1 and "model exists; an export overwrites nothing" in said.sentence and not list(Path("model").iterdir())


@pytest.mark.parametrize(
    ("lost", "step", "during"),
    [
        ("models/final/policy/model.safetensors", None, "miles_core.inspection.export.copy_files"),
        ("models/final/policy", None, "miles_core.inspection.export.copy_files"),
        ("checkpoints/step-000004", 4, "miles_core.inspection.export.export_cut"),
        ("checkpoints/step-000004", 4, "miles_core.assembly.build_trainer"),
    ],
)
def test_weights_that_vanish_meanwhile_are_named_not_the_target(own_run, tmp_path, monkeypatch, lost, step, during):
    """A run that goes on prunes its checkpoints, and a file may be lost: it is not the target that cannot be written."""
    real = resolve_name(during)

    def too_late(*arguments):
        shutil.rmtree(own_run / lost) if (own_run / lost).is_dir() else (own_run / lost).unlink()
        return real(*arguments)

    monkeypatch.setattr(during, too_late)
    with pytest.raises(CheckpointError, match=rf"{lost}.* cannot be read, or is gone since the export began"):
        export(RunDir(own_run), tmp_path / "model", step)
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".model-*"))


def test_a_target_that_cannot_be_written_is_named(finished_run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/model cannot be written"):
        export(RunDir(finished_run), tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("path", "hub", "fact"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/home/somebody/secret/base-1", None, "base-1, a local directory"),
        ("~/secret/base-1", None, "base-1, a local directory"),
        ("${SECRET_UNSET}/base-1", None, "base-1, a local directory"),
        ("secret/here", None, "here, a local directory"),
    ],
)
def test_a_card_names_the_hubs_model_and_no_directory_of_this_machine(finished_run, tmp_path, monkeypatch, path, hub, fact):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "here").mkdir(parents=True)
    config = RunConfig.from_resolved(finished_run / "config.yaml")
    first = config.stages["sft"]
    based = first.models["policy"].model_copy(update={"path": path, "config": None, "tokenizer": None})
    stages = config.stages | {"sft": first.model_copy(update={"models": first.models | {"policy": based}})}
    config = config.model_copy(update={"stages": stages})
    _, front, text = model_card(RunDir(finished_run), config, "rl", "policy", 5, "model").split("---\n", 2)
    assert yaml.safe_load(front).get("base_model") == hub and f"| base model | {fact} |" in text
    assert "secret" not in (front + text).lower()


def test_a_card_explains_the_mismatch_only_where_it_was_measured(own_run):
    config, run = RunConfig.from_resolved(own_run / "config.yaml"), RunDir(own_run)
    assert "`mismatch/…`:" in model_card(run, config, "rl", "policy", 5, "model")
    run.metrics.write_text('{"step": 1, "stage": "sft", "stage_step": 1, "loss": 0.5}\n')
    card = model_card(run, config, "rl", "policy", 5, "model")
    assert "| loss | 0.5 | 1 |" in card and "mismatch" not in card


def test_what_cannot_be_exported_is_a_sentence_and_leaves_nothing(miles, own_run, tmp_path):
    def refused(*arguments: str) -> str:
        said = miles("export", str(own_run), "model", *arguments)
        assert said.code == 1 and not Path("model").exists() and not list(Path(".").glob(".model-*"))
        return said.sentence

    assert "no weights of step 3, only of step 4, step 5 (keep_checkpoints says" in refused("--step", "3")
    assert "no model 'polcy'. Did you mean 'policy'?" in refused("--model", "polcy")
    weights = own_run / "checkpoints" / "step-000004" / "models" / "policy" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "step-000004 is damaged" in refused("--step", "4")
    shutil.rmtree(own_run / "models" / "final")
    shutil.rmtree(own_run / "checkpoints")
    assert "has saved no weights yet" in refused()
    said = miles("export", str(tmp_path), "model")
    assert said.code == 1 and "is no run directory" in said.sentence
