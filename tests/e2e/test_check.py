"""``miles check`` answers without torch; ``--load`` builds everything."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

HEAVY = ("torch", "transformers", "ray", "sglang", "megatron", "triton", "datasets", "tensorboard", "matplotlib", "wandb")


@pytest.mark.parametrize("recipe", ["quickstart", "gsm8k/tiny"])
def test_check_validates_a_whole_recipe_without_torch(recipe):
    code = f"""
import sys
sys.argv = ["miles", "check", "{recipe}"]
from miles_core.cli import main
try:
    main()
except SystemExit as exit_:
    assert not exit_.code, exit_.code
print("loaded", [m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert "sft" in done.stdout and "grpo" in done.stdout and "nothing was built" in done.stdout


def test_check_for_machines_gives_the_resolved_tree(miles):
    said = miles("check", "mini.yaml", "--json", "seed=3")
    tree = json.loads(said.out)
    assert said.code == 0 and tree["seed"] == 3
    assert tree["stages"]["rl"]["models"]["policy"]["losses"]["ppo"]["clip_high"] == 0.28  # the quick start's
    assert tree["stages"]["rl"]["models"]["policy"]["losses"]["ppo"]["clip_low"] == 0.2  # a default


def test_the_plan_says_whose_weights_a_stage_goes_on_with(miles):
    sft, rl = miles("check", "mini.yaml").out.split("rl: ")
    assert "from a new qwen3" in sft and "from the weights of stage sft" in rl


def test_what_is_no_terminal_gets_whole_lines(miles, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert len(miles("run", "quikstart").err.splitlines()) == 1
    assert len(miles("plugins", "tracker").out.splitlines()) == 2 + len(json.loads(miles("plugins", "tracker", "--json").out)["tracker"])


def test_version_and_help(miles):
    assert miles("--version").out == f"miles {version('miles-core')}\n"
    said = miles()
    assert "quickstart" not in said.out and "resume" in said.out and said.err == ""


def test_check_load_builds_every_part(miles):
    said = miles("check", "mini.yaml", "--load")
    assert said.code == 0 and "everything was built" in said.out


def test_recipes_plugins_and_doctor_say_what_is_there(miles):
    recipes = json.loads(miles("recipes", "--json").out)
    assert {"quickstart", "gsm8k/tiny"} <= recipes.keys() and all(recipes.values())
    plugins = json.loads(miles("plugins", "--json").out)
    assert "miles-rollout 0.1.0" in plugins["rollout_engine"]["local"] and "miles-agents 0.1.0" in plugins["environment"]["calculator"]
    said = miles("doctor", "--json")
    found = {f["what"]: f["state"] for f in json.loads(said.out)}
    assert said.code == 0 and found["python"] == found["plug-ins"] == found["miles-train"] == "ok"
    said = miles("plugins", "rewards")
    assert said.code == 1 and "Did you mean 'reward'" in said.sentence
