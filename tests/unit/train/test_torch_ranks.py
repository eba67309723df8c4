"""`trainer: torch` over ranks beside itself in one process: reports, cuts, refusals, failures. Its gradients are in tests/differential
(conformance) and tests/integration (every loss and aggregation)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from fixtures.megatron import STEEP, spread_trainer, torch_twin
from fixtures.trainers import routed_batch
from fixtures.training import ragged_batch, same, started, weights, without_weight, write_scalar_model

from miles_core.batch import Batch
from miles_core.columns import COLUMNS, ColumnSpec
from miles_core.errors import CheckpointError, ConfigError, DataError, RanksLost, StepRefused
from miles_core.lora import Lora
from miles_core.protocols import Place

Start = Callable[..., Any]
STEADY: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}
"""A large eps keeps AdamW from dividing noise by noise."""


@pytest_asyncio.fixture
async def start(cluster: Any, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts trainers over ranks, and closes them."""
    async with started(lambda path, **options: spread_trainer(path, tmp_path, cluster, **options)) as start:
        yield start


def near(a: dict[str, Any], b: dict[str, Any], tolerance: float = 2e-6) -> bool:
    return a.keys() == b.keys() and all(float((a[n].float() - b[n].float()).abs().max()) < tolerance for n in b)


async def held(trainer: Any) -> dict[str, Any]:
    return await asyncio.to_thread(weights, trainer)


# The same as in one process


@pytest.mark.parametrize("ranks, skip", [(2, True), pytest.param(3, False, marks=pytest.mark.slow)])
async def test_two_optimizer_steps_end_where_one_process_ends(start: Start, dense: Path, ranks: int, skip: bool):
    """Weights, and every number that is reported, mismatch included; with a loss that lets samples without advantage be skipped."""
    given = {"losses": {"policy": {"use": "ppo_clip", "old": "rollout"}}, "skip_zero_advantages": skip}
    ours = await start(dense, ranks=ranks, **given, **STEADY)
    theirs = torch_twin(dense, ours, skip_zero_advantages=skip)
    ours.version = theirs.version = 3  # that of most tokens of the batch
    batch = ragged_batch(steps=2)
    advantages = np.where((batch.segments.trajectory % 3 == 0)[batch.segment], 0, batch.array("advantages")).astype(np.float32)
    batch = batch.with_columns({"advantages": advantages})
    report, expected = await ours.step(batch), await theirs.step(batch)
    assert report.optimizer_steps == expected.optimizer_steps == 2
    assert report.metrics.keys() == expected.metrics.keys() and ("skipped" in report.metrics) == skip
    for name in expected.metrics.keys() - {"seconds/forward_backward"}:
        assert report.metrics[name] == pytest.approx(expected.metrics[name], rel=2e-5, abs=1e-6), name
    assert near(await held(ours), weights(theirs))


async def test_a_mixture_replays_its_routing(start: Start, moe: Path):
    ours = await start(moe, routing_replay=True, compare_routing=True, **STEADY)
    theirs = torch_twin(moe, ours, compare_routing=True)
    ours.version = theirs.version = 3
    batch = routed_batch(layers=2, experts=4, k=2)
    report, expected = await ours.step(batch), await theirs.step(batch)
    assert {"routing/replayed", "routing/differs", "mismatch_own_routing/mean_abs"} <= report.metrics.keys() == expected.metrics.keys()
    for name in expected.metrics.keys() - {"seconds/forward_backward"}:
        assert report.metrics[name] == pytest.approx(expected.metrics[name], rel=2e-5, abs=1e-6), name
    np.testing.assert_allclose(report.columns["old_logprobs"], expected.columns["old_logprobs"], atol=1e-5, rtol=0, equal_nan=True)
    assert near(await held(ours), weights(theirs))


async def test_the_gradient_does_not_depend_on_micro_batches(start: Start, moe: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a rank has nothing to do: a single sample. Nor on what is computed again. No step is long enough to move a weight.
    Batches have a column that a plug-in declared, in a module that no rank imports."""
    monkeypatch.setitem(COLUMNS, "marks", ColumnSpec("marks", "token", ("float32",), 0.0))
    batch = ragged_batch()
    one = Batch.of([batch.refs[0]])
    one = one.with_columns({"advantages": np.ones(one.n_rows, np.float32)})
    still = {"lr": 1e-30, "weight_decay": 0.0}
    trainers = [await start(moe, micro_batch_tokens=tokens, recompute=tokens == 1, **still) for tokens in (1, 10_000)]
    twin = torch_twin(moe, trainers[0])
    for given in (batch, one):
        given = given.with_columns({"marks": np.ones(given.n_rows, np.float32)})
        norms, said = [], []
        for trainer in trainers:
            said.append((await trainer.annotate(given, frozenset({"ref_logprobs"}))).array("ref_logprobs"))
            norms.append((await trainer.step(given)).metrics["grad_norm"])
        expected = (await twin.step(given)).metrics["grad_norm"]
        assert norms == pytest.approx([expected] * 2, rel=1e-5)
        np.testing.assert_allclose(said[0], said[1], atol=1e-5, rtol=0, equal_nan=True)
        assert np.isfinite(said[0][given.array("loss_mask")]).all()


async def test_a_critic_learns_and_is_exported(start: Start, dense: Path, tmp_path: Path):
    path = write_scalar_model(tmp_path / "scalar", dense)
    ours = await start(path, role="critic", losses={"value": {"use": "value_clip", "clip": None}}, **STEADY)
    theirs = torch_twin(path, ours)
    rng, batch = np.random.default_rng(0), ragged_batch()
    batch = batch.with_columns({"returns": rng.standard_normal(batch.n_rows).astype(np.float32)})
    given = [(await t.annotate(batch, frozenset({"values"}))).array("values") for t in (ours, theirs)]
    np.testing.assert_allclose(*given, atol=1e-5, rtol=0)
    report, expected = [await t.step(batch.with_columns({"values": given[1]})) for t in (ours, theirs)]
    assert report.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5) and not report.columns
    assert near(await held(ours), weights(theirs))
    for trainer, name in ((ours, "ours"), (theirs, "theirs")):
        await trainer.export(tmp_path / name)
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "theirs/config.json").read_text()
    with pytest.raises(ConfigError, match="a critic of trainer 'torch' cannot give 'old_logprobs', only values"):
        await ours.annotate(batch, frozenset({"old_logprobs"}))


async def test_bfloat16_has_float32_masters(start: Start, dense: Path, tmp_path: Path):
    """At lr 1e-6 a bfloat16 weight of 2⁻⁹ and more never moves by itself; the masters keep the float32 checkpoint's digits."""
    import json

    from safetensors.torch import load_file

    trainer = await start(dense, dtype="bfloat16", lr=1e-6, weight_decay=0.0)
    source, before = load_file(dense / "model.safetensors"), await held(trainer)
    assert all(str(w.dtype) == "torch.bfloat16" and w.equal(source[n].bfloat16()) for n, w in before.items())
    await trainer.save(tmp_path / "zero")
    masters = load_file(tmp_path / "zero/weights.safetensors")
    assert all(masters[n].equal(source[n]) for n in source)
    await trainer.step(ragged_batch())
    await trainer.save(tmp_path / "one")
    moved = load_file(tmp_path / "one/weights.safetensors")["model.norm.weight"] - masters["model.norm.weight"]
    assert float((moved.abs() - 1e-6).abs().median()) < 1e-7  # AdamW's first step is lr in every direction
    await trainer.export(tmp_path / "export")
    written = load_file(tmp_path / "export/model.safetensors")
    assert same(written, await held(trainer))
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "bfloat16"


async def test_an_adapter_is_what_one_process_makes_of_it(start: Start, moe: Path, tmp_path: Path):
    """Reports, the weights that are published, both ways of writing them, and cuts; the model itself is in none of these."""
    from safetensors.torch import load_file

    lora = Lora("the base", rank=4, targets=("q_proj", "v_proj", "o_proj"), seed=3)
    ours = await start(moe, lora=lora, **STEADY)
    theirs, batch = torch_twin(moe, ours), ragged_batch()
    for step in range(3):
        if step == 2:
            await ours.save(tmp_path / "cut")
            theirs = torch_twin(moe, ours)
            await theirs.load(tmp_path / "cut")  # two ranks' cut goes on in one process
        report, expected = await ours.step(batch), await theirs.step(batch)
        for name in expected.metrics.keys() - {"seconds/forward_backward"}:
            assert report.metrics[name] == pytest.approx(expected.metrics[name], rel=2e-5, abs=1e-6), name
    published = await held(ours)
    assert len(published) == 2 * 2 * 3 and near(published, weights(theirs))
    assert all(float(weight.abs().max()) > 0 for weight in published.values())
    await ours.export(tmp_path / "ours")
    await theirs.export(tmp_path / "theirs")
    assert (tmp_path / "ours/adapter_config.json").read_text() == (tmp_path / "theirs/adapter_config.json").read_text()
    assert same(load_file(tmp_path / "ours/adapter_model.safetensors"), published)
    assert {name.rsplit(".", 3)[1] for name in load_file(tmp_path / "cut/weights.safetensors")} == {"lora_A", "lora_B"}


# Cuts


async def test_a_cut_goes_on_on_any_number_of_ranks(start: Start, moe: Path, tmp_path: Path):
    """Written by two, read by three and by one, and the other way round: nothing but weights, moments and counters is in it."""
    batch = ragged_batch()
    two, one = await start(moe, **STEADY), torch_twin(moe, spread_trainer(moe, tmp_path, None, **STEADY))
    for trainer, directory in ((two, tmp_path / "two"), (one, tmp_path / "one")):
        await trainer.step(batch)
        await trainer.save(directory)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
    three, alone = await start(moe, ranks=3, **STEADY), torch_twin(moe, two)
    for trainer in (three, alone):
        await trainer.load(tmp_path / "two")
        assert trainer.optimizer_steps == 1
        assert same(await held(trainer), await held(two))
    await two.step(batch)
    for trainer in (three, alone):
        await trainer.step(batch)
        assert near(await held(trainer), await held(two))
    await three.load(tmp_path / "one")
    assert same(await held(three), weights(one))


async def test_a_damaged_cut_is_refused_by_all_ranks_and_changes_nothing(start: Start, dense: Path, tmp_path: Path):
    trainer = await start(dense, **STEADY)
    await trainer.save(tmp_path / "cut")
    await trainer.step(ragged_batch())
    before = await held(trainer)
    file = tmp_path / "cut/weights.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read"):
        await trainer.load(tmp_path / "cut")
    assert same(await held(trainer), before)
    await trainer.step(ragged_batch())  # it goes on


# What is refused


def test_what_cannot_be_is_said_before_anything_starts(dense: Path, tmp_path: Path):
    built = spread_trainer(dense, tmp_path, None)
    with pytest.raises(ConfigError, match=r"bitwise needs ranks: 1"):
        built.config.build(replace(built.context, bitwise=True))
    assert built.config.bitwise_problems() == ["adds gradients up over 2 ranks; numerics: bitwise needs ranks: 1"]


def test_more_ranks_than_gpus_is_a_sentence(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from miles_train.ranks.worker import RankWorker

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options: Any = SimpleNamespace(context=SimpleNamespace(device="cuda"))
    with pytest.raises(ConfigError, match=r"rank 2 of 4 wants GPU 2 of its machine, which has 2; use as many ranks as GPUs"):
        RankWorker(Place(2, 4, 2, "file:///nowhere", 1), options)


async def test_there_must_be_a_cluster(dense: Path, tmp_path: Path):
    trainer = spread_trainer(dense, tmp_path, None)
    with pytest.raises(ConfigError, match="trainer 'torch' runs on the ranks of a cluster, and there is none; set cluster: processes"):
        await trainer.start()
    await trainer.close()


async def test_a_model_that_cannot_be_read_is_a_sentence_of_all_ranks(start: Start, dense: Path, tmp_path: Path):
    path = without_weight(tmp_path / "lacking", dense, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match=r"lacks 1 weights of Qwen3ForCausalLM, the first is 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        await start(path)


async def test_batches_are_checked_before_they_are_sent(start: Start, dense: Path):
    trainer = await start(dense)
    batch = ragged_batch()
    batch.refs[4].get().tokens[0] = -1
    with pytest.raises(DataError, match=rf"sample {batch.refs[4].id} holds token id -1"):
        await trainer.step(batch)


async def test_a_gradient_that_is_not_finite_names_its_sample(start: Start, dense: Path):
    trainer = await start(dense, losses={"nll": {"use": "fixtures.megatron:steep"}})
    batch, culprit = ragged_batch(), 7
    advantages = batch.array("advantages").copy()
    advantages[batch.rows_of(np.array([culprit]))] = STEEP
    before = await held(trainer)
    named = rf"optimizer step 1: the gradient's norm is .*; it comes from sample {batch.refs[culprit].id}\."
    with pytest.raises(StepRefused, match=named):
        await trainer.step(batch.with_columns({"advantages": advantages}))
    assert same(await held(trainer), before)
    assert np.isfinite((await trainer.step(batch)).metrics["grad_norm"])  # it goes on


async def test_a_loss_that_refuses_is_heard_and_the_ranks_go_on(start: Start, dense: Path):
    """With an error of its own, too, of which the controller knows no more than that it is a DataError."""
    trainer = await start(dense, losses={"mean": {"use": "fixtures.megatron:unhappy"}})
    for one in (trainer, torch_twin(dense, trainer)):
        with pytest.raises(DataError, match=r"^this loss is for images$"):
            await one.step(ragged_batch())
    await trainer.annotate(ragged_batch(), frozenset({"old_logprobs"}))


# Ranks that fail: in the fast tests those of the cluster (tests/unit/core/test_processes.py)


def pid_of_rank_1(run_dir: Path) -> int:
    return int((run_dir / "logs/trainer-policy-rank-1.log").read_text().split("pid ")[1].split(",")[0])


@pytest.mark.slow
async def test_a_rank_that_dies_is_named(start: Start, dense: Path, tmp_path: Path):
    trainer = await start(dense)
    os.kill(pid_of_rank_1(tmp_path), signal.SIGKILL)
    with pytest.raises(RanksLost, match=r"^rank 1 of 2 of trainer-policy died in gradients \(signal SIGKILL\)"):
        await trainer.step(ragged_batch())


@pytest.mark.slow
async def test_a_rank_that_hangs_is_named_when_the_time_is_up(start: Start, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = await start(dense)
    await trainer.step(ragged_batch())
    os.kill(pid_of_rank_1(tmp_path), signal.SIGSTOP)
    monkeypatch.setattr("miles_train.ranks.trainer.BEFORE", 1 / trainer._deadlines.train)
    with pytest.raises(
        RanksLost, match=r"waited .* s for .* samples to be annotated: .*rank.* 1 .*of trainer-policy did not answer annotate"
    ):
        await trainer.annotate(ragged_batch(), frozenset({"old_logprobs"}))
