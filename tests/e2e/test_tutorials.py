"""The scripts of ``docs/tutorials``: what each says it shows is what its run did. Short ones here, whole ones among the slow tests."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from miles_core.plugin_finding import _DECORATED
from miles_core.sample import Sample
from miles_core.sample_io import load_samples

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
SMALLER = (
    (r"^SFT, RL = .*$", "SFT, RL = 2, 2"),
    (r'"stages.rl.groups=8"|(?<=RL}, )groups: 8', lambda found: FEW[found[0][0] == '"']),
)
FEW = ("groups: 2, evaluators: {{held_out: {{prompts: 8}}}}", '"stages.rl.groups=2", "stages.rl.evaluators.held_out.prompts=8"')


def shortened(name: str, directory: Path) -> Path:
    """A copy of a script that takes two small steps a stage."""
    text = (TUTORIALS / name).read_text()
    for old, new in SMALLER:
        text, replaced = re.subn(old, new, text, flags=re.MULTILINE)
        assert replaced == 1, (name, old)
    path = directory / name
    path.write_text(text)
    return path


def rows_of(run: Path, key: str = "reward") -> list[dict]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in row]


def trained(run: Path, step: int) -> list[Sample]:
    return load_samples(run / "trajectories" / f"step-{step:06d}.safetensors")


@pytest.fixture
def play(tmp_path, monkeypatch, capsys):
    """``play(name)``: run a shortened script in this process (imports cost seconds), in a directory of its own; gives what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path.copy())
    monkeypatch.setattr("miles_core.plugin_finding._DECORATED", _DECORATED.copy())

    def call(name: str) -> str:
        path = shortened(name, tmp_path)
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    yield call
    for name in [n for n, m in sys.modules.items() if str(tmp_path) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


def right(sample: Sample) -> bool:
    """Whether the answer is, put together from the tokens that the policy sampled last."""
    answer = re.fullmatch(r".* ans (-?\d+)(<eos>)?", sample.metadata["response"])
    return answer is not None and int(answer[1]) == sample.label


def test_every_script_is_short_and_numbered_in_order():
    scripts = sorted(TUTORIALS.glob("[0-9]_*.py"))
    assert [int(path.name[0]) for path in scripts] == list(range(1, len(scripts) + 1)) and len(scripts) >= 7
    for path in scripts:
        assert 20 <= len(path.read_text().splitlines()) <= 62, path.name
        assert f"docs/tutorials/{path.name}" in path.read_text(), path.name  # it says how to run it


def test_the_first_runs_as_a_process_and_the_last_reads_its_run_without_torch(tmp_path):
    done = subprocess.run([sys.executable, shortened("1_run_from_python.py", tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "runs" / "first")
    assert f"step 4: reward {rows[-1]['reward']:.2f}" in done.stdout and "after step 2: " in done.stdout
    assert "4 steps; everything is in runs/first" in done.stdout

    program = f"import runpy, sys; runpy.run_path({str(TUTORIALS / '7_look_into_a_run.py')!r}, run_name='__main__')"
    look = subprocess.run(
        [sys.executable, "-c", f"{program}; assert 'torch' not in sys.modules"], cwd=tmp_path, capture_output=True, text=True
    )
    assert look.returncode == 0, look.stderr
    assert f"{rows[-1]['reward']:.2f} at step 4" in look.stdout
    samples = trained(tmp_path / "runs" / "first", 4)
    assert all(f"{sample.prompt} " in look.stdout for sample in samples)
    assert "user, 0 trained" in look.stdout and "weights of version {3}" in look.stdout


def paid_as_the_functions_say(run: Path, step: int) -> None:
    samples = trained(run, step)
    for sample in samples:
        assert sample.rewards["right"] == right(sample)
        assert sample.reward == pytest.approx(sample.rewards["right"] + 0.5 * sample.rewards["brief"])
    for group in {s.id.group for s in samples}:
        members = [s for s in samples if s.id.group == group]
        shortest = min((s.n_sampled for s in members if right(s)), default=None)
        for sample in members:
            price = 0 if shortest is None else 0.01 * max(0, sample.n_sampled - shortest)
            assert sample.rewards["brief"] == pytest.approx(-price)


def test_your_reward(play, miles):
    play("2_your_reward.py")
    run = Path("runs/my_reward")
    paid_as_the_functions_say(run, 4)
    before = [sample.rewards for sample in trained(run, 4)]
    shutil.rmtree(run / "models" / "final")
    for cut in (run / "checkpoints").iterdir():
        shutil.rmtree(cut)
    said = miles("resume", str(run))  # finds the functions, and does all of it again
    assert said.code == 0, said.err
    assert [sample.rewards for sample in trained(run, 4)] == before


def each_call_was_paid_for(run: Path, step: int) -> None:
    for sample in trained(run, step):
        calls = sum(turn.role == "environment" for turn in sample.turns)
        assert sample.reward == pytest.approx(right(sample) - 0.1 * calls)
        assert sample.metadata.get("calls", calls) == calls


def test_your_environment(play):
    assert "step-000004: " in play("3_your_environment.py")
    each_call_was_paid_for(Path("runs/my_environment"), 4)


def test_your_loss(play):
    play("4_your_loss.py")
    for row in rows_of(Path("runs/my_loss")):
        assert row["optimizer_steps"] == 2 and row["tether"] >= 0 and "loss/tethered" in row and "loss/ppo" not in row
    assert rows_of(Path("runs/my_loss"))[-1]["tether"] > 0  # the second optimizer step is off the policy that sampled


def test_your_dataset(play):
    play("5_your_dataset.py")
    asked = {s.prompt for step in (3, 4) for s in trained(Path("runs/my_dataset"), step)}
    held_out = {s.prompt for s in load_samples("runs/my_dataset/trajectories/eval-rl.held_out-000004.safetensors")}
    assert len(held_out) == 8 and not asked & held_out
    assert all(re.fullmatch(r"\d\d \+ \d\d \+ \d\d \?", prompt) for prompt in asked | held_out)


def test_your_model(play):
    from safetensors.numpy import load_file

    play("6_your_model.py")
    final = Path("runs/from_scratch/models/final/policy")
    config = json.loads((final / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]) == (3, 128, 4)
    assert [row["stage"] for row in rows_of(Path("runs/from_directory"))] == ["rl", "rl"]
    start, end = load_file(final / "model.safetensors"), load_file("runs/from_directory/models/final/policy/model.safetensors")
    assert start.keys() == end.keys()
    assert max(float(np.abs(end[name] - start[name]).max()) for name in start) < 1e-2  # two small steps from what the directory holds


README = Path(__file__).parents[2] / "README.md"
SMALL = ("stages.sft.steps=2", "stages.rl.steps=2", "stages.rl.groups=2", "stages.rl.evaluators.held_out.prompts=8", "trackers={}")


def test_the_readme_leads_to_a_reward_of_your_own(miles):
    """Its two files and its commands, as they stand, but for fewer and smaller steps."""
    section = README.read_text().split("## Your own reward")[1].split("\n## ")[0]
    code, recipe, commands = (found[1] for found in re.finditer(r"```\w*\n(.*?)```", section, re.DOTALL))
    Path(code.splitlines()[0].removeprefix("# ")).write_text(code)
    Path(recipe.splitlines()[0].removeprefix("# ")).write_text(recipe)
    for command in commands.splitlines():
        words = command.removeprefix("uv run --locked miles ").replace("170:0", "4:0").split()
        said = miles(*words, *(SMALL if words[0] == "run" else ()))
        assert said.code == 0, (command, said.err)
        if words[0] == "compare":
            assert "rewards/frugal" in said.out and "stages.rl.rewards.frugal.per_call" in said.out
    for run, price in (("cheap", 0.1), ("dear", 0.6)):
        for sample in trained(Path("runs") / run, 4):
            assert sample.rewards["frugal"] == pytest.approx(-price * sample.metadata["response"].count("<call>"))
            assert sample.reward == pytest.approx(sample.rewards["environment"] + sample.rewards["frugal"])


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{name}.md" for name in ("quickstart", "concepts", "troubleshooting", "architecture", "plug-points"))]
)
def test_links_lead_somewhere(page):
    """Files are there, and so are the headings that a link names."""
    root = README.parent
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", (root / page).read_text()):
        file, _, heading = target.partition("#")
        path = ((root / page).parent / file).resolve() if file else root / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.trainer.lrr=1", "unknown key 'models.policy.trainer.lrr'. Did you mean 'lr'?"),
        ("stages.rl.rewards.x.use=brevity", "no reward is called 'brevity'. Known: "),
        ("stages.rl.rollout.sampling.top_p=0.9", "sampling restricts the support (top_p, top_k, min_p)"),
        ("stages.rl.models.policy.advantage=gae", "needs 'values', which nothing gives. Add a model with role: critic"),
    ],
)
def test_sentences_of_the_troubleshooting_page_are_said(miles, override, words):
    assert words in (README.parent / "docs" / "troubleshooting.md").read_text()
    said = miles("check", "quickstart", override)
    assert said.code == 1 and words in said.sentence


def test_a_gpu_that_is_not_there_is_a_sentence(miles):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    said = miles("run", "mini.yaml", "device=cuda")
    assert said.code == 1 and "device is cuda, but torch" in said.sentence and "sees no GPU here" in said.sentence


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "run", "key", "holds"),
    [
        ("1_run_from_python.py", "first", "reward", None),
        ("2_your_reward.py", "my_reward", "reward", paid_as_the_functions_say),
        ("3_your_environment.py", "my_environment", "reward", each_call_was_paid_for),
        ("4_your_loss.py", "my_loss", "reward", None),
        ("5_your_dataset.py", "my_dataset", "eval/held_out/avg@1", None),
        ("6_your_model.py", "from_directory", "eval/held_out/avg@1", None),
    ],
)
def test_a_whole_script_learns(tmp_path, name, run, key, holds):
    """A real process of the script as it stands."""
    done = subprocess.run([sys.executable, TUTORIALS / name], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "runs" / run, key)
    curve = [row[key] for row in rows]
    assert max(curve[-3:]) > curve[0] + 0.25, curve
    if holds is not None:
        holds(tmp_path / "runs" / run, rows[-1]["step"])
