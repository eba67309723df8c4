"""`trainer: torch` on a GPU gives the CPU's numbers, and a run is at home there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.training import MODELS, build_trainer, ragged_batch, toy_ppo, weights, write_model

pytestmark = pytest.mark.gpu

LAYOUTS = ("padded", "packed", "shared")
STEP: dict[str, Any] = dict(lr=1e-2, eps=1e-3, micro_batch_tokens=60)


@pytest.fixture(scope="module", params=["dense", "moe"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpu") / request.param, **MODELS[request.param])


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_log_probabilities_and_a_step_are_the_cpus(path: Path, layout: str) -> None:
    """float32: logprobs within 1e-4, the step's gradient norm and each weight's change within 1e-3 of the CPU's."""
    batch = ragged_batch()
    trainers = {device: build_trainer(path, layout=layout, device=device, dtype="float32", **STEP) for device in ("cpu", "cuda")}
    start = weights(trainers["cpu"])
    said, reports = {}, {}
    for device, trainer in trainers.items():
        said[device] = (await trainer.annotate(batch, frozenset({"old_logprobs"}))).array("old_logprobs")
        reports[device] = (await trainer.step(batch)).metrics
    np.testing.assert_allclose(said["cuda"], said["cpu"], atol=1e-4, rtol=0, equal_nan=True)
    for name in ("loss", "entropy", "grad_norm"):
        assert reports["cuda"][name] == pytest.approx(reports["cpu"][name], rel=1e-3), name
    expected, found = weights(trainers["cpu"]), weights(trainers["cuda"])
    for name, before in start.items():
        moved = float((expected[name] - before).norm())
        assert float((found[name].cpu() - expected[name]).norm()) <= 1e-3 * moved, name


async def test_bfloat16_is_near_and_keeps_float32_masters(path: Path) -> None:
    batch = ragged_batch()
    cpu, gpu = build_trainer(path, dtype="float32", **STEP), build_trainer(path, device="cuda", **STEP)  # bfloat16 is its default
    expected, found = [(await t.annotate(batch, frozenset({"old_logprobs"}))).array("old_logprobs") for t in (cpu, gpu)]
    assert float(np.nanmean(np.abs(found - expected))) < 0.1
    await gpu.step(batch)
    assert {str(tensor.dtype) for tensor in weights(gpu).values()} == {"torch.bfloat16"}


async def test_a_checkpoint_of_the_gpu_goes_on_there(path: Path, tmp_path: Path) -> None:
    """What ``save`` wrote gives the very next weights, in a new trainer."""
    batch = ragged_batch()
    one, other = (build_trainer(path, losses={"policy": toy_ppo}, device="cuda", dtype="float32", **STEP) for _ in range(2))
    await one.step(batch)
    await one.save(tmp_path / "cut")
    await other.load(tmp_path / "cut")
    before = weights(one)
    assert all(tensor.equal(before[name]) for name, tensor in weights(other).items())


FULL = ["models.policy.trainer.dtype=float32", "stages.rl.models.policy.engine.dtype=float32"]
SMALL = ["trackers={}", "stages.sft.steps=20", "stages.rl.steps=4", "stages.rl.groups=4", "stages.rl.evaluators={}"]


@pytest.mark.parametrize("overrides, bound", [([], 0.1), (FULL, 1e-4)], ids=["bfloat16", "float32"])
async def test_a_run_on_the_gpu(overrides: list[str], bound: float, tmp_path: Path) -> None:
    """Rollout, training and publishing on one GPU: the engine's log-probabilities are the trainer's but for rounding."""
    from miles_core.config import resolve
    from miles_core.runner import Run

    run = await Run(resolve("quickstart", ["device=cuda", f"runs_dir={tmp_path}", *SMALL, *overrides])).start()
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    mismatches = [row["mismatch/mean_abs"] for row in rows if "mismatch/mean_abs" in row]
    assert len(mismatches) == 4 and max(mismatches) < bound
