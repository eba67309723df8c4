"""Trainer and engine of one process keep one copy of the weights, where nothing is sampled while they change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def rows_of(run: Path) -> list[dict]:
    """Of the steps that published, after the stage's first publish, which always copies."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == "rl" and "publish/bytes" in row][1:]


@pytest.mark.parametrize(
    "overrides, copies",
    [
        ([], False),
        (["models.policy.trainer.dtype=bfloat16", "stages.rl.models.policy.engine.dtype=bfloat16"], False),
        (["numerics=bitwise"], False),
        (["stages.rl.max_staleness=1"], True),  # the engine goes on under the old weights meanwhile
    ],
)
def test_a_publish_copies_nothing_where_that_is_safe(overrides: list[str], copies: bool, miles, tmp_path: Path):
    said = miles("run", "mini.yaml", "runs_dir=runs", "stages.rl.steps=4", *overrides)
    assert said.code == 0, said.sentence
    rows = rows_of(tmp_path / "runs" / "mini")
    assert [row["publish/bytes"] > 0 for row in rows] == [copies] * 4
    fresh = [row["mismatch/mean_abs"] for row in rows if "mismatch/mean_abs" in row]
    assert fresh and max(fresh) < (0.1 if "bfloat16" in str(overrides) else 1e-5)  # the engine serves what was trained


def test_experts_that_the_checkpoint_names_one_by_one_are_copied(miles, tmp_path: Path):
    experts = "{model_type: qwen3_moe, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16, decoder_sparse_step: 1}"
    said = miles("run", "mini.yaml", "runs_dir=runs", f"models.policy.config={experts}")
    assert said.code == 0, said.sentence
    rows = rows_of(tmp_path / "runs" / "mini")
    experts_bytes = 2 * 4 * 3 * 16 * 32 * 4  # layers, experts, matrices, their sides, float32
    assert [row["publish/bytes"] for row in rows] == [experts_bytes] * 3
    assert max(row["mismatch/mean_abs"] for row in rows if "mismatch/mean_abs" in row) < 1e-5
