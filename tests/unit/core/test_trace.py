"""The trace of a run: Chrome's events, readable wherever it was cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_core.trace import Trace


def events(path: Path) -> list[dict]:
    """What a viewer reads: an array that may lack its end."""
    return json.loads(path.read_text().rstrip().rstrip(",") + "]")


def test_phases_and_tasks_become_events(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    with trace.span("train", step=3), trace.task("group", "g0", position=7):
        pass
    begin, end, span = events(tmp_path / "trace.json")
    assert (begin["ph"], end["ph"], begin["id"], end["id"]) == ("b", "e", "g0", "g0") and begin["args"]["position"] == 7
    assert (span["ph"], span["name"], span["args"]) == ("X", "train", {"step": 3})
    assert span["ts"] <= begin["ts"] <= end["ts"] <= span["ts"] + span["dur"]


def test_what_fails_is_in_it_and_another_life_goes_on_in_the_same_file(tmp_path):
    with pytest.raises(KeyError), Trace(tmp_path / "trace.json").span("rollout"):
        raise KeyError
    with Trace(tmp_path / "trace.json").span("train"):
        pass
    assert [e["name"] for e in events(tmp_path / "trace.json")] == ["rollout", "train"]


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Trace(None).span("train"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_life_that_was_killed_in_the_middle_of_a_line_leaves_no_half_event(tmp_path):
    with Trace(tmp_path / "trace.json").span("train"):
        pass
    with (tmp_path / "trace.json").open("a") as file:
        file.write('{"pid": 3, "ph')
    with Trace(tmp_path / "trace.json").span("publish"):
        pass
    assert [e["name"] for e in events(tmp_path / "trace.json")] == ["train", "publish"]
