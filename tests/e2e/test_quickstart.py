"""The quick start: its miniature in every test run, the real thing on several seeds among the slow ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_miniature_leaves_a_directory_that_anyone_can_read(miles):
    said = miles("run", "mini.yaml", "trackers={tensorboard: {use: tensorboard}}")
    assert said.code == 0, said.err
    run = Path("runs/mini")
    rows = rows_of(run)
    assert [r["step"] for r in rows] == [1, 2, 2, 3, 4, 5]  # the evaluation before the first rl step has a row of its own
    assert [r["stage"] for r in rows] == ["sft", "sft", "rl", "rl", "rl", "rl"]
    assert {"loss", "grad_norm", "entropy", "lr", "time/rollout", "time/train", "seconds"} <= rows[-1].keys()
    assert {"reward", "clip_fraction", "kl", "mismatch/mean_abs", "mismatch/ess", "eval/held_out/avg@1"} <= rows[-1].keys()
    assert rows[-1]["mismatch/mean_abs"] < 5e-5  # fp32: engine and trainer agree (DESIGN §6)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = AutoModelForCausalLM.from_pretrained(run / "models" / "final" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(run / "models" / "final" / "policy")
    assert final.config.hidden_size == 32 and tokenizer.decode(tokenizer.encode("47 + 58 - 12 ?")) == "47 + 58 - 12 ?"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert (run / "reward.png").stat().st_size > 10_000
    for piece in ("before", "after", "reward.png", "models/final"):
        assert piece in said.out


def test_trajectories_hold_what_was_trained(miles):
    from miles_core.sample_io import load_samples

    assert miles("run", "mini.yaml").code == 0
    samples = load_samples("runs/mini/trajectories/step-000005.safetensors")
    assert len(samples) == 8
    for sample in samples:
        sample.validate(vocab_size=22)
        assert set(sample.versions[sample.loss_mask].tolist()) == {4}  # sampled by the weights of the step before, nothing older
        injected = [t for t in sample.turns if t.role == "environment"]
        assert not any(sample.loss_mask[t.start : t.end].any() for t in injected)
    for group in {s.id.group for s in samples}:
        advantages = [s.columns["advantages"][-1] for s in samples if s.id.group == group]
        rewards = np.array([s.reward for s in samples if s.id.group == group])
        np.testing.assert_allclose(advantages, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6), atol=1e-4)


def test_a_run_that_stops_and_resumes_equals_one_that_does_not(miles):
    """Same curve: on one machine, with one thread count, the schedule of a synchronous run is the same."""
    assert miles("run", "mini.yaml", "name=whole").code == 0
    Path("stopper.py").write_text(STOPPER)
    said = miles("run", "mini.yaml", "name=parts", "hooks.stop.use=stopper:StopAtFour")
    assert said.code == 130 and "miles resume runs/parts" in said.out
    assert miles("resume", "runs/parts").code == 0
    whole, parts = rows_of(Path("runs/whole")), rows_of(Path("runs/parts"))
    assert [r["step"] for r in parts if r["stage_step"]] == [1, 2, 3, 4, 5]
    for a, b in zip([r for r in whole if r["stage_step"]], [r for r in parts if r["stage_step"]], strict=True):
        assert a["reward" if "reward" in a else "loss"] == pytest.approx(b["reward" if "reward" in b else "loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


STOPPER = """
from pathlib import Path

class StopAtFour:
    def after_publish(self, loop):
        if loop.version == 4 and not Path("stopped").exists():
            Path("stopped").touch()
            loop.request_stop()
"""


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(miles):
    """A real process and a real signal."""
    recipe = Path("mini.yaml")
    recipe.write_text(recipe.read_text().replace("steps: 3", "steps: 2000"))
    environment = os.environ | {"COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "miles_core.cli", "run", "mini.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    metrics = Path("runs/mini/metrics.jsonl")
    until = time.monotonic() + 200
    try:
        while (
            process.poll() is None and time.monotonic() < until and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 6)
        ):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    done = rows_of(Path("runs/mini"))[-1]["step"]
    assert f"Stopped after step {done}" in " ".join(out.split()) and "miles resume runs/mini" in " ".join(out.split())
    manifest = json.loads((Path("runs/mini/checkpoints") / f"step-{done:06d}" / "manifest.json").read_text())
    assert manifest["state"]["global_step"] == done


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_start_learns_on_most_seeds(tmp_path):
    """From at most .45 to at least .90 held-out on at least 4 of 5 seeds (issue 2). Its time is benchmarks/quickstart.py's business."""
    learned = []
    for seed in range(5):
        command = [sys.executable, "-m", "miles_core.cli", "run", "quickstart", f"seed={seed}", f"runs_dir={tmp_path}", f"name=seed{seed}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        accuracy = [r["eval/held_out/avg@1"] for r in rows_of(tmp_path / f"seed{seed}") if "eval/held_out/avg@1" in r]
        learned.append((accuracy[0], accuracy[-1]))
        print(f"seed {seed}: {accuracy}")
    assert sum(before <= 0.45 and after >= 0.90 for before, after in learned) >= 4, learned
