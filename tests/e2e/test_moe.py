"""A mixture of experts from end to end: SGLang samples, Megatron-core trains on two expert-parallel ranks, the routing is replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.engines import model_path

MINIATURE = """
extends: moe
name: mini-moe
trackers: {}
stages:
  sft: null
  rl:
    steps: 3
    groups: 2
    rollout: {group_size: 4, sampling: {max_tokens: 12}}
    evaluators: {held_out: null}
    rewards: {odd: "parity:odd"}
    every: {checkpoint: 2}
"""
REWARD = """
def odd(sample):
    return float(sample.tokens.sum() % 2)
"""
"""An untrained model solves nothing; of this, half the samples get something."""


def write_recipe() -> None:
    Path("mini-moe.yaml").write_text(MINIATURE)
    Path("parity.py").write_text(REWARD)


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def attached(sglang_moe_server: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make the miniature use the session's server and the model it was started with."""
    monkeypatch.setenv("MILES_TEST_KEY", sglang_moe_server.token)
    engine = f"{{use: sglang, urls: [{sglang_moe_server.url}], key_variable: MILES_TEST_KEY}}"
    path = model_path("moe", tmp_path_factory)
    return [f"models.policy.path={path}", "models.policy.config=null", f"stages.rl.models.policy.engine={engine}"]


def test_a_few_steps(miles: Any, attached: list[str]):
    """Weights reach the server each step and are verified; what it sampled is what the ranks train on, experts included."""
    from miles_core.sample_io import load_samples

    write_recipe()
    said = miles("run", "mini-moe.yaml", *attached)
    assert said.code == 0, said.err
    rows = rows_of(Path("runs/mini-moe"))
    assert [r["step"] for r in rows] == [1, 2, 3]
    for row in rows:
        assert row["mismatch/mean_abs"] < 5e-5 and row["mismatch/ess"] > 0.999
        assert row["routing/replayed"] > 0.5
        assert row["publish/bytes"] > 100_000 and row["publish/verified"] == 1
    samples = load_samples("runs/mini-moe/trajectories/step-000003.safetensors")
    for sample in samples:
        sample.validate(vocab_size=22)
        routing = sample.columns["routing"]
        assert routing.dtype == np.uint8 and routing.shape == (len(sample), 2, 2)
        sampled = sample.versions[1:] >= 0  # a conversation may end with what the environment says, whose rows nobody sampled from
        assert (routing[:-1][sampled] < 8).all() and (routing[-1] == 255).all()
        assert set(sample.versions[sample.loss_mask].tolist()) == {2}

    from safetensors.torch import load_file

    before = load_file(Path(attached[0].split("=")[1]) / "model.safetensors")
    after = load_file("runs/mini-moe/models/final/policy/model.safetensors")
    assert before.keys() == after.keys()
    unmoved = [name for name, weight in before.items() if after[name].equal(weight)]
    assert all(".experts." in name for name in unmoved), "only an expert that no trained token went to may stay as it was"


def test_stop_and_resume(miles: Any, attached: list[str]):
    """A run that ended after two steps goes on from its cut on new ranks, with the weights that the server is given anew."""
    write_recipe()
    assert miles("run", "mini-moe.yaml", *attached).code == 0
    run = Path("runs/mini-moe")
    cuts = sorted(run.glob("checkpoints/step-*"))
    (cuts[-1] / "manifest.json").unlink()  # as if it had been killed while it wrote the last one
    said = miles("resume", str(run))
    assert said.code == 0, said.err
    assert [r["step"] for r in rows_of(run) if not r.get("void")][-1] == 3
