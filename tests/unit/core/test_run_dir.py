"""A run is a directory anyone can read, live and after the fact."""

from __future__ import annotations

import json

import pytest

from miles_core.errors import ConfigError
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


def log(run, steps):
    tracker = JsonlTracker(run.metrics)
    for step in steps:
        tracker.log(step, {"reward": step / 10})
    tracker.close()


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_are_read_in_order_and_an_unfinished_line_is_passed_over(run):
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "rew')
    assert [r["step"] for r in run.rows()] == [1, 2, 3, 4, 5]
    assert next(run.rows()) == {"step": 1, "reward": 0.1}


def test_a_run_without_metrics_has_no_rows(tmp_path):
    run = RunDir.create(tmp_path, "mini")
    assert list(run.rows()) == [] and run.void_rows_after(0) == 0


def test_rows_beyond_the_cut_become_void_and_are_never_deleted(run):
    assert run.void_rows_after(3) == 2
    assert steps_of(run.metrics) == [1, 2, 3]
    assert run.void_rows_after(3) == 0
    log(run, [4, 5, 6])
    assert run.void_rows_after(4) == 2
    assert steps_of(run.metrics) == [1, 2, 3, 4]
    assert steps_of(run.path / "metrics.void.jsonl") == [4, 5, 5, 6]
    assert [r["reward"] for r in run.rows()] == [0.1, 0.2, 0.3, 0.4]


def test_after_a_kill_in_the_middle_of_a_line_the_next_row_starts_on_one_of_its_own(run):
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "rew')
    run.void_rows_after(5)
    log(run, [6, 7])
    assert [r["step"] for r in run.rows()] == [1, 2, 3, 4, 5, 6, 7]
