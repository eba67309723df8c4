"""``miles inspect`` on a run that ended, and on ones that are damaged, of another version, or have nothing yet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from miles_core.sample_io import load_samples

HEAVY = ("torch", "transformers", "ray", "sglang", "megatron", "triton", "datasets", "tensorboard", "matplotlib", "wandb")


@pytest.fixture
def own_run(finished_run, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "own"))


def test_the_list_names_what_can_be_shown_in_full(miles, finished_run):
    said = miles("inspect", str(finished_run), "--step", "4..5", "--json")
    listed = [json.loads(line) for line in said.out.splitlines()]
    assert said.code == 0 and {(f["step"], f["source"]) for f in listed} == {(4, "(train)"), (5, "(train)"), (5, "rl.held_out")}
    [wanted] = [f for f in listed if f["address"] == "5:3"]
    sample = load_samples(finished_run / "trajectories" / "step-000005.safetensors")[3]
    assert wanted["group"] == sample.id.group and wanted["reward"] == sample.reward and wanted["oldest"] == wanted["newest"] == 4
    printed = miles("inspect", str(finished_run), "--limit", "3")
    assert "the last 3 of 40 trajectories" in printed.out and "rl.held_out@5:7" in printed.out and "rl.held_out@5:4" not in printed.out

    whole = json.loads(miles("inspect", str(finished_run), "5:3", "--json").out)
    assert whole["tokens"] == sample.tokens.tolist() and "".join(whole["texts"]).startswith(sample.prompt)
    for name in ("logprobs", "advantages", "old_logprobs"):
        expected = [None if np.isnan(v) else float(v) for v in sample.columns[name]]
        assert whole["columns"][name] == expected
    assert whole["columns"]["loss_mask"] == sample.loss_mask.tolist()


def test_the_trainers_ratio_of_trained_tokens_is_there_and_near_one(finished_run):
    """The quick start's loss asks for no old log-probabilities; its trainer computes them in the one optimizer step of each step."""
    known = 0
    for sample in load_samples(finished_run / "trajectories" / "step-000005.safetensors"):
        difference, trained = sample.columns["old_logprobs"] - sample.logprobs, sample.loss_mask
        assert np.isnan(difference[~trained]).all()
        if sample.columns["advantages"][trained].any() or np.isfinite(difference[trained]).any():  # a trainer may skip those without
            known += 1
            assert np.abs(difference[trained]).max() < 5e-5  # fp32: engine and trainer agree (DESIGN §6); a NaN is not less
    assert known


def test_filters_and_groups(miles, finished_run):
    samples = load_samples(finished_run / "trajectories" / "step-000005.safetensors")
    wanted = samples[0].prompt
    said = miles("inspect", str(finished_run), "--step", "5", "--prompt", wanted, "--reward", "..0.5", "--json")
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [f["address"] for f in found] == [f"5:{i}" for i, s in enumerate(samples) if s.prompt == wanted and s.reward <= 0.5]
    groups = [json.loads(line) for line in miles("inspect", str(finished_run), "--step", "5", "--groups", "--json").out.splitlines()]
    for group in groups[:2]:
        rewards = [s.reward for s in samples if s.id.group == group["group"]]
        assert (group["size"], group["mean"], group["std"]) == (4, np.mean(rewards), np.std(rewards))
    said = miles("inspect", str(finished_run), "--step", "5", "--reward", str(samples[0].reward), "--groups", "--json")
    assert all(json.loads(line)["size"] == 4 for line in said.out.splitlines() if json.loads(line)["source"] == "(train)")  # whole groups
    nothing = miles("inspect", str(finished_run), "--prompt", "no such text")
    assert nothing.code == 0 and "0 trajectories, chosen among 40" in nothing.out


@pytest.mark.parametrize("by", ["logprobs", "advantages", "ratio", "loss_mask", "versions"])
def test_one_in_full_shows_turns_in_any_colour(miles, finished_run, by):
    said = miles("inspect", str(finished_run), "5:0", "--by", by)
    assert said.code == 0 and f"{by}: " in said.out and "user · tokens 0 to" in said.out and "assistant · tokens" in said.out


def test_a_page_is_written_and_said_to_be(miles, finished_run):
    said = miles("inspect", str(finished_run), "--html", "page.html")
    assert (
        said.code == 0
        and "page.html: 40 trajectories, all with their tokens" in said.out
        and "Content-Security" in Path("page.html").read_text()
    )
    assert (
        "0 with their tokens (more: --html-tokens" in miles("inspect", str(finished_run), "--html", "page.html", "--html-tokens", "0").out
    )


def test_a_run_that_goes_on_can_be_looked_into(miles, own_run):
    """What a writer leaves for a moment: files that have no name yet, a line that has no end yet."""
    (own_run / "trajectories" / "step-000006.safetensors.partial").write_bytes(b"half")
    with (own_run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')
    said = miles("inspect", str(own_run), "--step", "5")
    assert said.code == 0 and not said.err
    assert miles("compare", str(own_run), "--metrics", "reward").code == 0


def test_a_damaged_file_is_named_and_the_others_are_shown(miles, own_run):
    damaged = own_run / "trajectories" / "step-000004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for extra in ([], ["--groups"], ["--json"], ["--html", "page.html"]):
        said = miles("inspect", str(own_run), *extra)
        assert said.code == 0 and "passed over" in said.sentence and "step-000004.safetensors: cannot be read" in said.sentence
    assert "32 trajectories" in miles("inspect", str(own_run)).out
    said = miles("inspect", str(own_run), "4:0")
    assert said.code == 1 and "step-000004.safetensors: cannot be read" in said.sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--step", "9"), "no trajectories of that step. It has those of steps 2, 3, 4, 5"),
        (("--step", "5..1"), "--step '5..1': expected a number, or a range"),
        (("--reward", "good"), "--reward 'good': expected a number, or a range"),
        (("9:0",), "no trajectories of that step"),
        (("5:99",), "no trajectory 5:99: those of step 5 are 5:0 to 5:7"),
        (("5",), "expected STEP:NUMBER"),
        (("5:0", "--by", "logprob"), "Did you mean 'logprobs'?"),
        (("rl.held_out@5:0", "--by", "ratio"), "has no ratio: it has no old_logprobs"),
        (("--html", "no/page.html"), "the page cannot be written"),
        (("--html", "."), ". is a directory; --html names the page's file, such as page.html"),
        (("5:0", "--step", "5"), "'5:0' names one trajectory; --step is for lists"),
        (("--html", "page.html", "--json"), "leave --json out"),
    ],
)
def test_what_is_not_there_is_a_sentence(miles, finished_run, arguments, sentence):
    said = miles("inspect", str(finished_run), *arguments)
    assert said.code == 1 and sentence in said.sentence and "Traceback" not in said.err


def test_a_directory_that_is_no_run_or_of_another_version_is_a_sentence(miles, own_run, tmp_path):
    for command in (("inspect",), ("compare",)):
        said = miles(*command, str(tmp_path / "nothing"))
        assert said.code == 1 and "is no run directory" in said.sentence
    (own_run / "run.json").write_text('{"format": 2, "miles": "9.9"}')
    said = miles("inspect", str(own_run))
    assert said.code == 1 and "Use Miles 9.9" in said.sentence


def test_a_configuration_that_this_version_does_not_know_keeps_nobody_from_looking(miles, own_run):
    with (own_run / "config.yaml").open("a") as file:
        file.write("bogus: 1\n")
    said = miles("inspect", str(own_run), "5:0")
    assert said.code == 0 and "user · tokens" in said.out and "plug-ins" in said.sentence and "unknown key 'bogus'" in said.sentence


def test_a_run_without_trajectories_is_a_sentence(miles, own_run):
    shutil.rmtree(own_run / "trajectories")
    said = miles("inspect", str(own_run))
    assert said.code == 1 and "has no trajectories yet (6 rows of metrics)" in said.sentence


@pytest.mark.parametrize("arguments", [[], ["5:0"], ["--groups"], ["--html", "page.html"]])
def test_looking_needs_no_torch(finished_run, tmp_path, arguments):
    code = f"""
import sys
sys.argv = ["miles", "inspect", {str(finished_run)!r}, *{arguments!r}]
from miles_core.cli import main
main()
print("loaded", [m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("inspect ", "runs/mini"),
        ("resume runs/m", "runs/mini"),
        ("compare runs/mini runs/", "runs/mini"),
        ("run quick", "quickstart"),
        ("insp", "inspect"),
    ],
)
def test_the_shell_completes_runs_recipes_and_commands(tmp_path, typed, offered):
    run = tmp_path / "runs" / "mini"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: mini\n")
    words = f"miles {typed}"
    completing = {"_MILES_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    command = [str(Path(sys.executable).with_name("miles"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=os.environ | completing)
    assert offered in done.stdout.splitlines(), (done.stdout, done.stderr)
