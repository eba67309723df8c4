"""A run is a directory anyone can read, live and after the fact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from miles_core.errors import ConfigError, DataError, RunError
from miles_core.run_dir import RunDir
from miles_core.trackers import JsonlTracker


def test_runs_of_one_name_are_counted(tmp_path):
    runs = [RunDir.create(tmp_path / "deep" / "runs", "mini") for _ in range(3)]
    assert [r.path.name for r in runs] == ["mini", "mini-2", "mini-3"]
    for run in runs:
        assert all(d.is_dir() for d in (run.trajectories, run.checkpoints, run.models, run.logs))


def test_a_run_is_never_made_over_a_file_of_its_name(tmp_path):
    (tmp_path / "mini").write_text("mine")
    assert RunDir.create(tmp_path, "mini").path.name == "mini-2"
    assert (tmp_path / "mini").read_text() == "mine"


def test_a_place_where_nothing_can_be_made_is_a_sentence(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match=r"runs/mini cannot be made: Not a directory\. Set runs_dir"):
        RunDir.create(tmp_path / "runs", "mini")


def test_only_a_directory_with_a_config_is_a_run(tmp_path):
    run = RunDir.create(tmp_path, "mini")
    with pytest.raises(ConfigError, match=r"mini is no run directory: it has no config\.yaml"):
        RunDir.open(run.path)
    run.config.write_text("name: mini\n")
    assert RunDir.open(run.path).metrics == run.metrics


# ---- rows ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    run = RunDir.create(tmp_path, "mini")
    log(run, range(1, 6))
    return run


def log(run, steps, stage="rl"):
    tracker = JsonlTracker(run.metrics)
    for step in steps:
        tracker.log(step, {"stage": stage, "stage_step": step, "reward": step / 10})
    tracker.close()


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_are_read_in_order_and_an_unfinished_line_is_passed_over(run):
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "rew')
    assert [r["step"] for r in run.rows()] == [1, 2, 3, 4, 5]
    assert next(run.rows()) == {"step": 1, "stage": "rl", "stage_step": 1, "reward": 0.1}


def test_a_damaged_row_is_named(run):
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl:3 is damaged .* expected a JSON object\. Take the line out"):
        list(run.rows())


def test_a_run_without_metrics_has_no_rows(tmp_path):
    run = RunDir.create(tmp_path, "mini")
    assert list(run.rows()) == [] and run.make_void({}, 0) == 0
    assert not run.void.exists()


def test_what_is_beyond_the_cut_becomes_void_and_is_never_deleted(run):
    names = ["step-000003", "step-000004", "step-000005", "eval-held_out-000003", "eval-held_out-000004"]
    for name in names:
        (run.trajectories / f"{name}.safetensors").write_text(name)
    assert run.make_void({"rl": 3}, 3) == 5
    assert steps_of(run.metrics) == [1, 2, 3]
    assert run.make_void({"rl": 3}, 3) == 3
    log(run, [4, 5, 6])
    (run.trajectories / "step-000005.safetensors").write_text("again")
    assert run.make_void({"rl": 4}, 4) == 6
    assert steps_of(run.metrics) == [1, 2, 3, 4]
    assert [steps_of(run.void / n / "metrics.jsonl") for n in ("1", "2")] == [[4, 5], [5, 6]]
    assert [r["reward"] for r in run.rows()] == [0.1, 0.2, 0.3, 0.4]
    assert sorted(p.stem for p in run.trajectories.iterdir()) == ["eval-held_out-000003", "step-000003"]
    aside = {str(p.relative_to(run.void)): p.read_text() for p in run.void.rglob("*.safetensors")}
    assert aside == {
        **{f"1/trajectories/{n}.safetensors": n for n in ("step-000004", "step-000005", "eval-held_out-000004")},
        "2/trajectories/step-000005.safetensors": "again",
    }


def test_the_evaluation_before_a_later_stages_first_step_is_void_though_its_step_is_not(tmp_path):
    """It has the last step of the stage before as its step, and is done again."""
    run = RunDir.create(tmp_path, "mini")
    tracker = JsonlTracker(run.metrics)
    rows = [(1, "sft", 1), (2, "sft", 2), (2, "rl", 0), (3, "rl", 1)]
    for step, stage, stage_step in rows:
        tracker.log(step, {"stage": stage, "stage_step": stage_step})

    def left():
        return [(r["step"], r["stage"], r["stage_step"]) for r in run.rows()]

    assert run.make_void({"sft": 2, "rl": 1}, 3) == 3 and left() == rows
    assert run.make_void({"sft": 2}, 2) == 3 and left() == rows[:2]
    for step, stage, stage_step in rows[2:]:
        tracker.log(step, {"stage": stage, "stage_step": stage_step})
    assert run.make_void({"sft": 2, "rl": 0}, 2) == 3 and left() == rows[:2]  # stopped before its first step: evaluated again
    assert run.make_void({}, 0) == 2 and left() == []


def test_after_a_kill_in_the_middle_of_a_line_the_next_row_starts_on_one_of_its_own(run):
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "rew')
    run.make_void({"rl": 5}, 5)
    log(run, [6, 7])
    assert [r["step"] for r in run.rows()] == [1, 2, 3, 4, 5, 6, 7]


def test_what_was_being_written_at_a_kill_goes_and_nothing_else(run):
    unfinished = [run.trajectories / ".tmpXb12", run.trajectories / "step-000006.safetensors.partial", run.path / "config.partial"]
    whole = [run.trajectories / "step-000005.safetensors", run.path / "notes.txt", run.models / "rl" / "policy" / "config.json"]
    half_built = run.models / "rl" / ".policy-k3j" / "model"
    half_built.mkdir(parents=True)
    (run.models / "rl" / "policy").mkdir()
    for path in unfinished + whole:
        path.write_text("x")
    run.clear_unfinished()
    assert not [p for p in (*unfinished, half_built.parent) if p.exists()] and all(p.exists() for p in (*whole, run.metrics))


# ---- who writes, and which version ---------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from miles_core.run_dir import RunDir
with RunDir(Path(sys.argv[1])).writing():
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_write_to_one_run_and_a_dead_ones_lock_blocks_nobody(run):
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "mine\n"
            with pytest.raises(RunError, match=rf"mini is in use: process {holder.pid} on \S+, since .* Wait for it to end, or stop it"):
                with run.writing():
                    pass
        finally:
            holder.kill()
    assert holder.returncode == -9
    with run.writing():
        assert run.lock.read_text().startswith(f"process {os.getpid()} on ")


def test_one_process_writes_to_a_run_once(run):
    with run.writing():
        with pytest.raises(RunError, match=r"in use by this very process"), RunDir(run.path / "." / ".." / "mini").writing():
            pass
    with run.writing():
        pass


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ('{"format": 99, "miles": "7.1"}', r"mini has format 99, made by Miles 7\.1; Miles \S+ goes on with format 1\. Use Miles 7\.1"),
        ('{"format": 0, "miles": "0.0.1"}', r"mini has format 0, made by Miles 0\.0\.1; .* Use Miles 0\.0\.1 for this run"),
        ('{"format"', r"run\.json cannot be read \(JSONDecodeError"),
        ("[]", r"run\.json cannot be read \(TypeError"),
        (None, r"mini has no run\.json: an earlier version of Miles made it\. .* start a new run"),
    ],
)
def test_a_run_of_another_version_is_refused_with_both_versions(run, facts, said):
    run.write_config("name: mini\n")
    assert json.loads(run.facts.read_text()) == {"format": 1, "miles": metadata.version("miles-core")}
    run.facts.unlink()
    if facts is not None:
        run.facts.write_text(facts)
        with pytest.raises(ConfigError, match=said):
            RunDir.open(run.path)
    with pytest.raises(ConfigError, match=said):
        run.check_format()


def test_files_that_a_run_cannot_do_without_are_on_the_disk_before_they_have_their_names(run, monkeypatch):
    """A power cut after ``config.yaml`` is there must not leave an empty one."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", os.path.basename(b))), replace(a, b)))
    run.write_config("name: mini\n")
    assert done == [("fsync", "config.yaml.partial"), ("replace", "config.yaml"), ("fsync", "mini")]
    assert run.config.read_text() == "name: mini\n"
    done.clear()
    RunDir.create(run.path.parent, "other")
    assert done == [("fsync", "run.json.partial"), ("replace", "run.json"), ("fsync", "other")]
