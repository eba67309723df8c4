"""The tutorial of the decorator API: it learns; killed at any step and resumed by the command line, it is the undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorials" / "pytorch_loop.py"
SHORT = ("steps=60", 'steps=24, every={"checkpoint": 5}, trackers={}')


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def script(directory: Path, *replacements: tuple[str, str]) -> Path:
    """The tutorial, with pieces of it replaced, in a directory of its own."""
    text = TUTORIAL.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = directory / "alphabet_loop.py"
    path.write_text(text)
    return path


def run_script(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, path.name], cwd=path.parent, capture_output=True, text=True, timeout=300, env=os.environ)


@pytest.fixture(autouse=True)
def no_script_of_another_test(monkeypatch):
    """Every test's script has the same name: neither its module nor its directory may be found by the next."""
    monkeypatch.setattr("sys.path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "alphabet_loop", raising=False)
    yield
    sys.modules.pop("alphabet_loop", None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run of 24 steps."""
    directory = tmp_path_factory.mktemp("undisturbed")
    done = run_script(script(directory, SHORT))
    assert done.returncode == 0, done.stderr
    return directory / "runs" / "alphabet"


def test_the_tutorial_is_at_most_60_lines_and_learns(undisturbed):
    assert len(TUTORIAL.read_text().splitlines()) <= 60
    rows = rows_of(undisturbed)
    assert [r["step"] for r in rows] == list(range(1, 25))
    assert rows[0]["reward"] < 0.1 and rows[-1]["reward"] > 0.9
    assert {"loss", "time/rollout", "time/train", "tokens_per_second", "trajectories"} <= rows[0].keys()


def test_what_it_leaves_can_be_read(undisturbed):
    from safetensors.numpy import load_file

    from miles_core.sample_io import load_samples

    weights = load_file(undisturbed / "models" / "final" / "policy" / "policy.safetensors")["weight"]
    assert (weights[:24].argmax(1) == range(1, 25)).all()  # each letter is followed by the next
    samples = load_samples(undisturbed / "trajectories" / "step-000024.safetensors")
    assert len(samples) == 8 * 16
    for sample in samples:
        sample.validate(vocab_size=26)
        assert set(sample.versions[sample.loss_mask].tolist()) == {23}
        assert "advantages" in sample.columns
    events = json.loads((undisturbed / "logs" / "trace.json").read_text().rstrip().rstrip(",") + "]")
    assert {e["name"] for e in events} >= {"rollout", "train", "publish", "save", "group"}
    steps = [e["args"]["step"] for e in events if e["name"] == "train"]
    assert steps == list(range(24)) and all(e["dur"] > 0 for e in events if e["ph"] == "X")


def test_killed_and_resumed_it_is_the_undisturbed_run(undisturbed, tmp_path, miles):
    """SIGKILL in the twelfth update; ``miles resume`` imports the script anew and goes on from the cut after step 10."""
    killer = (
        "    if len(optimizer.state) and optimizer.state[policy.weight]['step'] == 11 and not __import__('os').path.exists('killed'):\n"
    )
    killer += "        open('killed', 'w').close()\n        __import__('os').kill(__import__('os').getpid(), 9)\n"
    done = run_script(script(tmp_path, SHORT, ("    rows = batch.tensors()\n", killer + "    rows = batch.tensors()\n")))
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in rows_of(tmp_path / "runs" / "alphabet")][-1] == 11

    said = miles("resume", "runs/alphabet")
    assert said.code == 0, said.err
    before, after = rows_of(undisturbed), rows_of(tmp_path / "runs" / "alphabet")
    assert [r["step"] for r in after] == list(range(1, 25))
    for key in ("loss", "reward", "reward/std", "sampled_tokens"):
        assert [r[key] for r in after] == [r[key] for r in before], key


def test_rollouts_stream_while_the_update_runs(tmp_path):
    """With max_staleness 2 groups of later steps are sampled before the step's own update is done, from weights that are not moved."""
    slow = ("    rows = batch.tensors()\n", "    __import__('time').sleep(0.3)\n    rows = batch.tensors()\n")
    done = run_script(script(tmp_path, ("steps=60", "steps=6, max_staleness=2, trackers={}"), slow))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "alphabet"
    events = json.loads((run / "logs" / "trace.json").read_text().rstrip().rstrip(",") + "]")
    first_train = next(e for e in events if e["name"] == "train")
    begun = [e for e in events if e["ph"] == "b" and first_train["ts"] < e["ts"] < first_train["ts"] + first_train["dur"]]
    before = [e for e in events if e["ph"] == "b" and e["ts"] < first_train["ts"]]
    assert len(before) + len(begun) >= 24  # three steps' groups were admitted by then
    from miles_core.sample_io import load_samples

    ages = set()
    for step in range(1, 7):
        for sample in load_samples(run / "trajectories" / f"step-{step:06d}.safetensors"):
            [version] = set(sample.versions[sample.loss_mask].tolist())  # one snapshot a trajectory
            ages.add(step - 1 - version)
    assert max(ages) in (1, 2) and min(ages) >= 0


@pytest.mark.parametrize(
    ("replacement", "sentence"),
    [
        (('return {"loss": loss.item()}', "return loss"), "update function 'learn' failed: it gave tensor"),
        (
            ('"loss": loss.item()', '"loss": float("nan")'),
            "update function 'learn' failed: it gave loss = nan; a metric is a finite number",
        ),
        (("loss.backward()", "loss.backwards()"), "update function 'learn' failed: AttributeError: 'Tensor' object has no attribute"),
        (('name="alphabet"', 'name="alphabet", models={}'), "miles.run makes models of its two functions; leave models out"),
        (('"optimizer": optimizer}', '"optimizer": Odd()}'), "state.optimizer.x is a set, which a checkpoint cannot hold without pickle"),
        (
            ('name="alphabet"', 'name="alphabet", sample_filters={"f": {"use": "length", "max_tokens": 3}}'),
            "the batch trains no token in any of its optimizer steps",
        ),
        (('"optimizer": optimizer}', '"optimizer": 3}'), "state 'optimizer', a int, has no state_dict and load_state_dict"),
        (("gives={", 'unit="group", gives={'), "declares 'unit'; a decorator takes name, needs, gives"),
        (('name="alphabet"', 'name="alphabet", max_stalenes=1'), "unknown key 'max_stalenes'. Did you mean 'max_staleness'?"),
        (("@miles.update(state={", "learn_nothing = dict(state={"), "decorate it with @miles.update"),
    ],
)
def test_a_mistake_is_a_sentence(tmp_path, replacement, sentence, monkeypatch):
    """In this process, by running the script's text: an import of torch costs seconds."""
    import runpy

    from miles_core.errors import MilesError

    monkeypatch.chdir(tmp_path)
    path = script(tmp_path, SHORT, replacement, ("@miles.rollout", ODD + "@miles.rollout"))
    with pytest.raises(MilesError) as found:
        runpy.run_path(str(path), run_name="__main__")
    assert sentence in str(found.value)


ODD = """
class Odd:
    def state_dict(self):
        return {"x": {1, 2}}

    def load_state_dict(self, state): ...


"""


def test_what_was_learned_before_an_update_failed_is_saved(tmp_path, monkeypatch, miles):
    """The eighth update fails after its optimizer step; the cut holds seven, and a mended script goes on from it."""
    import runpy

    from miles_core.errors import RunError

    monkeypatch.delitem(sys.modules, "alphabet_loop", raising=False)
    broken = (
        '    return {"loss": loss.item()}',
        "    assert optimizer.state[policy.weight]['step'] < 8\n    return {\"loss\": loss.item()}",
    )
    path = script(tmp_path, SHORT, broken)
    with pytest.raises(RunError, match="update function 'learn' failed: AssertionError") as found:
        runpy.run_path(str(path), run_name="__main__")
    assert found.value.__notes__ == ["What was learned is saved. Go on with: miles resume runs/alphabet"]
    assert "step-000007" in [p.parent.name for p in (tmp_path / "runs/alphabet/checkpoints").glob("*/manifest.json")]
    script(tmp_path, SHORT)
    monkeypatch.delitem(sys.modules, "alphabet_loop", raising=False)
    assert miles("resume", "runs/alphabet").code == 0
    assert [r["step"] for r in rows_of(tmp_path / "runs" / "alphabet")] == list(range(1, 25))


def test_a_script_without_a_guard_is_told_so_when_it_is_resumed(tmp_path, monkeypatch, miles):
    import runpy

    monkeypatch.delitem(sys.modules, "alphabet_loop", raising=False)
    path = script(tmp_path, ("steps=60", "steps=2, trackers={}"), ('if __name__ == "__main__":', "if True:"))
    runpy.run_path(str(path), run_name="__main__")
    monkeypatch.delitem(sys.modules, "alphabet_loop", raising=False)
    said = miles("resume", "runs/alphabet")
    assert said.code == 1 and "put the call under: if __name__ == '__main__':" in said.sentence
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["alphabet"]


def test_decorated_hooks_of_a_script_are_found_again(tmp_path, monkeypatch, miles):
    import runpy

    monkeypatch.delitem(sys.modules, "alphabet_loop", raising=False)
    hook = '@miles.hook\nclass Watch:\n    def on_end(self, loop):\n        open("ended", "a").write("x")\n\n\n@miles.rollout'
    replaced = ("steps=60", 'steps=4, trackers={}, every={"checkpoint": 2}, hooks={"w": {"use": "Watch"}}')
    path = script(tmp_path, replaced, ("@miles.rollout", hook))
    runpy.run_path(str(path), run_name="__main__")
    from miles_core.plugin_finding import _DECORATED

    del _DECORATED["hook", "Watch"]  # as in another process
    monkeypatch.delitem(sys.modules, "alphabet_loop", raising=False)
    shutil.rmtree(tmp_path / "runs/alphabet/checkpoints/step-000004")
    shutil.rmtree(tmp_path / "runs/alphabet/models/final")
    said = miles("resume", "runs/alphabet")
    assert said.code == 0, said.err
    assert (tmp_path / "ended").read_text() == "xx"
