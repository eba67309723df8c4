"""The plug-ins of ``docs/examples``, one for every plug-point: what each says in a recipe is right, and what it says it does is done."""

from __future__ import annotations

import asyncio
import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from miles_core.plugins import POINTS
from miles_core.sample_io import load_samples

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "examples"
OF_A_POINT = sorted(p for p in EXAMPLES.glob("*.py") if not p.stem.endswith(("_engine", "_trainer")))
SHORTER = ("stages.sft.steps=2", "stages.rl.steps=2", "stages.rl.groups=2", "stages.rl.evaluators.held_out.prompts=8")
SHORTER += ("stages.rl.group_filters.middling.low=0",)  # who has learned nothing gets nothing right


@pytest.fixture
def beside(monkeypatch):
    """The examples can be imported, and are forgotten afterwards."""
    monkeypatch.setattr("sys.path", [*sys.path, str(EXAMPLES)])
    yield
    for name in [n for n, m in sys.modules.items() if str(EXAMPLES) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


def test_every_point_has_an_example_that_the_page_names():
    rows = re.findall(r"^\| (\w+) \|.*\| \[[^]]+\]\(([^)#]+)\)[^|]*\|$", (DOCS / "plug-points.md").read_text(), re.MULTILINE)
    assert [point for point, _ in rows] and {point for point, _ in rows} == set(POINTS)
    for point, link in rows:
        text = (DOCS / link).read_text()
        assert text.startswith(f'"""{point}: ') if link.startswith("examples/") else link.startswith("tutorials/"), (point, link)
    assert {(DOCS / link).name for _, link in rows if link.startswith("examples/")} == {path.name for path in OF_A_POINT}


@pytest.mark.parametrize("path", OF_A_POINT, ids=lambda path: path.stem)
def test_what_an_example_says_in_a_recipe_is_right(path, tmp_path, beside):
    """The lines in its docstring, put into the quick start, each alone."""
    from miles_core.check import check
    from miles_core.config import RUN_KEYS, resolve

    text = path.read_text()
    assert len(text.splitlines()) <= 42
    said = yaml.safe_load("\n".join(line for line in text.split('"""')[1].splitlines()[1:] if line.startswith("    ")))
    recipe = {"extends": "quickstart", **{k: v for k, v in said.items() if k in RUN_KEYS}}
    stage = {k: v for k, v in said.items() if k not in RUN_KEYS}
    if "corrections" in str(stage):
        stage["models"]["policy"]["losses"] = {"ppo": {"old": "recompute"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stages": {"rl": stage}} | recipe))
    check(resolve(str(tmp_path / "r.yaml")))


def test_a_run_that_is_made_of_them(miles, beside):
    said = miles("run", str(EXAMPLES / "every_point.yaml"), *SHORTER)
    assert said.code == 0, said.err
    run = Path("runs/every_point")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sft, last = rows[0], rows[-1]
    samples = load_samples(run / "trajectories" / "step-000004.safetensors")

    assert sft["stage"] == "sft" and sft["tokens"] > 0  # dictation
    assert all(1 <= s.metadata["budget"] <= 8 >= sum(t.role == "assistant" for t in s.turns) for s in samples)
    assert {s.metadata["budget"] for s in samples} != {8}
    assert 0 <= last["filtered/no_errors"] <= 1 and "dropped_groups" in last
    for group in {s.id.group for s in samples}:  # ranks_in_group; what bounded_kl takes is small, and tells the equal apart
        ranks = [(s.reward, s.columns["advantages"][s.loss_mask][0]) for s in samples if s.id.group == group and s.loss_mask.any()]
        assert all(abs(rank) <= 1 for _, rank in ranks)
        assert all(rank > other for reward, rank in ranks for less, other in ranks if reward > less)
    assert "kl_reward/mean" in last and last["correction/near/dropped"] == 0
    assert last["moved"] > 0 and last["publish/tensors"] == 24
    assert 0 <= last["eval/easy/right"] <= 1
    meter = json.loads((run / "logs" / "meter.json").read_text())
    assert meter["calls"] > 32 and meter["sampled"] >= sum(s.n_sampled for s in samples)
    diary = (run / "logs" / "diary.txt").read_text().splitlines()
    assert diary[0] == "sft, step 0: began" and f"rl, step 4: loss {last['loss']:.3f}" in diary and "wrong" not in "".join(diary)
    table = list(csv.reader(Path("every_point.csv").read_text().splitlines()))
    assert [row[0] for row in table if row[2]] == ["1", "2", "3", "4"][2:]
    assert float(table[-1][1]) == last["reward"]


def test_a_group_filter_says_why(beside):
    from middling import middling

    def group(*rewards):
        return SimpleNamespace(rewards=lambda: {"policy": list(rewards)})

    assert middling(group(0, 0, 0)) == "too hard" and middling(group(1, 1)) == "too easy" and middling(group(0, 1)) is None


class Adder:
    """What a rank has."""

    def __init__(self, place, start):
        self.place, self.total = place, start

    def add(self, number):
        self.total += number
        return self.place.size, self.total

    def count(self, end):
        yield from range(end)


def test_a_cluster_in_this_process(tmp_path, beside):
    from this_process import ThisProcess

    async def play():
        cluster = ThisProcess()
        ranks = await cluster.start(f"{__name__}:Adder", 1, [(5,)], name="adder", log_dir=tmp_path, seconds=100)
        assert await ranks.call("add", [(2,)], seconds=100, what="a sum") == [(1, 7)]
        assert list(ranks.stream("count", [(3,)], seconds=100, what="numbers")) == [0, 1, 2]
        with pytest.raises(ValueError, match="adder wants 2 ranks; this process is one"):
            await cluster.start(f"{__name__}:Adder", 2, [(5,), (5,)], name="adder", log_dir=tmp_path, seconds=100)
        await ranks.close()

    asyncio.run(play())
