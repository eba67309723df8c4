"""Bad input gets a sentence and a non-zero exit, and nothing that was learned is lost (issue 2)."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.rl.stepz=3"], ["stepz", "Did you mean 'steps'", "override stages.rl.stepz=3"]),
        (["model.trainer.lrr=1"], ["lrr", "Did you mean 'lr'"]),
        (["stages.rl.models.policy.trainer.lr=fast"], ["trainer.lr", "'fast'", "valid number"]),
        (["stages.rl.models.policy.trainer.lr=-1"], ["trainer.lr", "greater than 0", "-1"]),
        (["stages.rl.steps=0"], ["stage rl", "steps is 0", "nothing would be trained"]),
        (["stages.sft.steps=0"], ["stage sft", "steps is 0"]),
        (["steps=5"], ["steps is set by stages sft, rl", "stages.rl.steps=5"]),
        (["seed"], ["override 'seed'", "key=value"]),
        (["model.path=/no/such/model", "model.config=null", "model.tokenizer=null"], ["/no/such/model"]),
        (["data.size=0"], ["data.size", "greater than 0"]),
        (["stages.rl.rollout.sampling.temperature=0"], ["temperature is 0", "greedy"]),
        (["stages.rl.rollout.environment.use=calculater"], ["calculater", "Did you mean 'calculator'"]),
        (["stages.rl.minibatches=2"], ["old: current", "recompute"]),
        (["stages.rl.rollout.group_size=1"], ["grpo", "groups", "group_size"]),
        (["rewards.mine.use=nowhere:reward"], ["nowhere", "not installed"]),
        (["model.trainer.use=torhc"], ["no trainer is called 'torhc'", "Did you mean 'torch'"]),
    ],
)
def test_wrong_settings_stop_before_anything_is_made(miles, overrides, expected):
    said = miles("run", "mini.yaml", *overrides)
    assert said.code == 1
    for piece in expected:
        assert piece in said.sentence
    assert not list(Path("runs").glob("*/metrics.jsonl")) and "Traceback" not in said.err


def test_missing_recipe(miles):
    said = miles("run", "quikstart")
    assert said.code == 1 and "Did you mean 'quickstart'" in said.sentence
    said = miles("check", "missing.yaml")
    assert said.code == 1 and "missing.yaml" in said.sentence
    said = miles("check", "mini.yml")
    assert said.code == 1 and "Did you mean 'mini.yaml'?" in said.sentence


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["", "{broken"], ["rows.jsonl:2"]),
        (["", json.dumps({"question": "b"})], ["rows.jsonl:2", "prompt"]),
        ([], ["rows.jsonl", "empty"]),
        (None, ["rows.jsonl"]),
    ],
)
def test_malformed_data_names_file_and_line(miles, lines, expected):
    if lines is not None:
        rows = [line or json.dumps({"prompt": "1 + 1 ?", "label": 2}) for line in lines]
        Path("rows.jsonl").write_text("".join(row + "\n" for row in rows))
    data = ["stages.rl.data={use: jsonl, path: rows.jsonl, label_field: label}", "stages.rl.shuffle=false"]
    said = miles("run", "mini.yaml", *data)
    assert said.code == 1
    for piece in expected:
        assert piece in said.sentence


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return float('nan')", ["reward 'mine'", "nan", "finite"]),
        ("return [1.0, 2.0]", ["reward 'mine'", "one finite number"]),
        ("return 1 / 0", ["reward 'mine'", "ZeroDivisionError"]),
        ("import time; time.sleep(30)", ["reward 'mine'", "waited 1 s"]),
    ],
)
def test_a_bad_reward_names_the_sample_and_keeps_what_was_learned(miles, body, expected):
    Path("my_rewards.py").write_text(
        f"CALLS = 0\ndef mine(sample):\n    global CALLS\n    CALLS += 1\n    if CALLS < 20: return 0.5\n    {body}\n"
    )
    said = miles("run", "mini.yaml", "stages.rl.rewards.mine.use=my_rewards:mine", "stages.rl.rewards.mine.timeout_s=1")
    assert said.code == 1
    for piece in [*expected, "policy/e0-train", "miles resume runs/mini"]:
        assert piece in said.sentence, said.err
    assert list(Path("runs/mini/checkpoints").glob("step-*/manifest.json"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import not_there\ndef mine(sample): return 1.0", ["my_plugin", "not_there", "not installed"]),
        ("def mine(): return 1.0", ["my_plugin:mine", "sample"]),
        ("mine = 3", ["mine", "int"]),
        ("def other(sample): return 1.0", ["no 'mine'"]),
    ],
)
def test_a_bad_plugin_says_what_is_wrong_with_it(miles, source, expected):
    Path("my_plugin.py").write_text(source)
    said = miles("check", "mini.yaml", "--load", "stages.sft.rewards.mine.use=my_plugin:mine")
    assert said.code == 1
    for piece in expected:
        assert piece in said.sentence


def test_a_token_outside_the_vocabulary_names_the_sample(miles):
    Path("my_rollout.py").write_text(
        "from miles_core import Sample, SampleId\n"
        "async def read(prompt, context):\n"
        "    id = SampleId(context.run, context.policies[0], prompt.id, context.group)\n"
        "    return [Sample.of(id, [1, 2, 999], loss_mask=[False, True, True])]\n"
    )
    said = miles("run", "mini.yaml", "stages.sft.rollout={use: 'my_rollout:read'}")
    assert said.code == 1
    assert "999" in said.sentence and "policy/e0-train" in said.sentence and "vocabulary" in said.sentence


def test_resume_refuses_what_is_no_run_or_has_no_cut(miles):
    said = miles("resume", "nowhere")
    assert said.code == 1 and "no run directory" in said.sentence
    Path("runs/x/checkpoints").mkdir(parents=True)
    miles("check", "mini.yaml")
    from miles_core.config import resolve

    Path("runs/x/config.yaml").write_text(resolve("mini.yaml").to_yaml())
    said = miles("resume", "runs/x")
    assert said.code == 1 and "has no run.json: an earlier version of Miles made it" in said.sentence


def test_a_finished_run_a_truncated_cut_and_another_configuration(miles):
    assert miles("run", "mini.yaml").code == 0
    said = miles("resume", "runs/mini")
    assert said.code == 1 and "finished" in said.sentence

    cuts = sorted(Path("runs/mini/checkpoints").glob("step-*"))
    weights = next(p for p in (cuts[-1] / "models" / "policy").iterdir() if p.suffix == ".safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    said = miles("resume", "runs/mini")
    assert said.code == 0 and "damaged" in said.out and cuts[-1].name in said.out  # fell back to the cut before, and said so

    config = Path("runs/mini/config.yaml")
    config.write_text(config.read_text().replace("seed: 0", "seed: 7", 1))
    said = miles("resume", "runs/mini")
    assert said.code == 1 and "another configuration" in said.sentence


def test_a_full_disk_is_a_sentence_and_the_last_cut_stays(miles, monkeypatch):
    from miles_core import cut

    commit, calls = cut.commit, []

    def full(partial, *arguments):
        calls.append(partial)
        if len(calls) == 3:  # the second step of the rl stage
            raise OSError(errno.ENOSPC, "No space left on device", str(partial))
        return commit(partial, *arguments)

    monkeypatch.setattr(cut, "commit", full)
    said = miles("run", "mini.yaml")
    assert said.code == 1
    assert "disk" in said.sentence and "full" in said.sentence and "miles resume runs/mini" in said.sentence
    monkeypatch.setattr(cut, "commit", commit)
    assert miles("resume", "runs/mini").code == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return bytes(1 << 62)", "the memory of this machine ran out"),
        ("import torch; torch.empty(1 << 52)", "the memory of this machine ran out"),
        ("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')", "the memory of the GPU ran out"),
    ],
)
def test_memory_that_runs_out_is_a_sentence(miles, body, expected):
    """Whatever the library calls it. What was learned until then is saved."""
    Path("my_hook.py").write_text(f"class Greedy:\n    def after_step(self, loop):\n        if loop.version < 4: return\n        {body}\n")
    said = miles("run", "mini.yaml", "hooks.greedy.use=my_hook:Greedy")
    assert said.code == 1 and "Traceback" not in said.err
    assert expected in said.sentence and "micro_batch_tokens" in said.sentence and "miles resume runs/mini" in said.sentence


def test_an_engine_that_has_no_memory_left_says_what_needs_less(miles):
    """It fails its calls, which are issued again; the last failure ends the run."""
    Path("my_hook.py").write_text(
        "import torch\n\n\ndef step(inbox):\n    raise torch.OutOfMemoryError('CUDA out of memory.')\n\n\n"
        "class Greedy:\n    def after_step(self, loop):\n"
        "        if loop.version == 4:\n            loop.players.engines['policy']._scheduler.step = step\n"
    )
    said = miles("run", "mini.yaml", "hooks.greedy.use=my_hook:Greedy")
    assert said.code == 1 and "Traceback" not in said.err
    assert "the local engine failed: OutOfMemoryError" in said.sentence and "engine.max_batch" in said.sentence
    assert "miles resume runs/mini" in said.sentence
