"""``miles compare``: two runs, one of which was told to differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def pair(finished_run, tmp_path) -> tuple[str, str]:
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    config = (other / "config.yaml").read_text()
    assert config.count("seed: 0\ndevice") + config.count("\nseed: 0\n") >= 1
    (other / "config.yaml").write_text(config.replace("\nseed: 0\n", "\nseed: 7\n", 1))
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "reward" in row:
            row["reward"] += 1
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(finished_run), str(other)


def test_two_runs_for_machines(miles, pair):
    said = miles("compare", *pair, "--metrics", "reward,mismatch/", "--at", "4", "--json")
    found = json.loads(said.out)
    first, second = found["runs"]
    rows = {r["step"]: r for r in map(json.loads, (Path(pair[0]) / "metrics.jsonl").read_text().splitlines()) if "reward" in r}
    assert first["steps"] == 5 and first["metrics"]["reward"]["final"] == {"step": 5, "value": rows[5]["reward"]}
    assert second["metrics"]["reward"]["at"]["4"] == rows[4]["reward"] + 1
    assert second["metrics"]["reward"]["best"]["value"] == max(r["reward"] for r in rows.values()) + 1
    assert {"mismatch/mean_abs", "mismatch/k3"} <= first["metrics"].keys()
    assert found["differences"] == {"seed": [0, 7]}


def test_two_runs_for_people(miles, pair):
    pytest.importorskip("matplotlib")
    said = miles("compare", *pair, "--at", "4", "--plot", "plot.png")
    assert said.code == 0 and "best" in said.out and "at 4" in said.out and "eval/held_out/avg@1" in said.out
    assert [line.split() for line in said.out.splitlines() if line.startswith("seed")] == [["seed", "0", "7"]]
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert "alike" in miles("compare", pair[0], pair[0]).out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--metrics", "rewards"), "Did you mean 'reward'?"),
        (("--at", "x"), "expected steps, such as 10,20"),
        (("--plot", "no/p.png"), "cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(miles, finished_run, arguments, sentence):
    said = miles("compare", str(finished_run), *arguments)
    assert said.code == 1 and sentence in said.sentence
