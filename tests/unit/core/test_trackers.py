"""Trackers, read back with the tools people read them with."""

from __future__ import annotations

import json
import time

import pytest

from miles_core.plugins import config_class
from miles_core.protocols import BuildContext
from miles_core.trackers import JsonlTracker

ROWS = [(1, {"stage": "rl", "loss": 0.5, "tokens": 1200}), (2, {"stage": "rl", "loss": -0.25, "tokens": 1300, "eval/held_out/avg@1": 0.75})]


def build(use, tmp_path, **options):
    return config_class("tracker", use).model_validate({"use": use, **options}).build(BuildContext(tmp_path, "mini", 0))


# ---- jsonl ---------------------------------------------------------------------------------------------------------------


def test_jsonl_has_one_object_a_step_readable_at_once(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    for number, (step, row) in enumerate(ROWS, start=1):
        tracker.log(step, row)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before it is closed: a run can be followed
        assert len(lines) == number and json.loads(lines[-1]) == {"step": step, **row}
    tracker.close()


def test_jsonl_goes_on_where_an_earlier_life_stopped(tmp_path):
    for step, row in ROWS:
        tracker = JsonlTracker(tmp_path / "metrics.jsonl")
        tracker.log(step, row)
        tracker.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


# ---- tensorboard ---------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_every_number_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = build("tensorboard", tmp_path)
    for step, row in ROWS:
        tracker.log(step, row)
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read == {"loss": [(1, 0.5), (2, -0.25)], "tokens": [(1, 1200.0), (2, 1300.0)], "eval/held_out/avg@1": [(2, 0.75)]}


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are told apart by a number that each process counts from 0, and are read in the order of their names.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for life, steps in enumerate((range(1, 6), range(3, 7))):
        tracker = build("tensorboard", tmp_path)
        for step in steps:
            tracker.log(step, {"loss": float(10 * life + step)})
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0), (6, 16.0)]


def test_tensorboard_writes_without_torch(tmp_path):
    import subprocess
    import sys

    pytest.importorskip("tensorboard")
    code = (
        "import sys; from pathlib import Path; from miles_core.protocols import BuildContext; from miles_core.trackers import *;"
        f"t = TensorBoard(use='tensorboard').build(BuildContext(Path({str(tmp_path)!r}), 'x', 0)); t.log(1, {{'loss': 1.0}}); t.close();"
        "assert 'torch' not in sys.modules and 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tensorboard").iterdir())


# ---- wandb ---------------------------------------------------------------------------------------------------------------


def wandb_records(path):
    """The protobuf messages of a transaction log: LevelDB's log format after a header of 7 bytes."""
    data, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


@pytest.mark.slow  # it starts a service: 2 s, or 7 on a busy machine
def test_wandb_offline_keeps_every_row(tmp_path, monkeypatch):
    """The real wandb, offline; its transaction log is what ``wandb sync`` would upload."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_API_KEY", "")
    tracker = build("wandb", tmp_path, mode="offline", project="tests")
    for step, row in ROWS:
        tracker.log(step, row)
    tracker.close()

    [log] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    until, rows, names = time.monotonic() + 30, [], set()
    while time.monotonic() < until and len(rows) < len(ROWS):  # its service writes the last of it a moment after finish()
        rows = []
        for data in wandb_records(log):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.display_name, record.run.project))
    assert names == {("mini", "tests")}
    assert [(r["_step"], {k: v for k, v in r.items() if not k.startswith("_")}) for r in rows] == ROWS
