"""What `trainer: megatron` promises besides its numbers at every layout (those are in tests/differential): reports, refusals, failures."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fixtures.megatron import STEEP, megatron_trainer, torch_twin
from fixtures.training import NO_GATES, VOCAB, ragged_batch, same, weights, without_weight

from miles_core.batch import Batch
from miles_core.columns import Ragged
from miles_core.errors import ConfigError, DataError, PluginError, RanksLost, RunError, StepRefused
from miles_core.refs import SampleRef

Start = Callable[..., Any]
TWO = {"data": 2}


NLL = {"nll": {"use": "nll"}}


# The same as the torch trainer


@pytest.mark.parametrize("layout", [{}, {"data": 2}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}], ids=str)
async def test_a_batch_of_two_optimizer_steps_ends_where_the_torch_trainer_ends(start: Start, dense: Path, layout: dict[str, int]):
    """Weights, and every number that is reported, mismatch included. A large eps keeps AdamW from dividing noise by noise."""
    ours = await start(dense, parallel=layout, lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    theirs = torch_twin(dense, ours)
    ours.version = theirs.version = 3  # that of most tokens of the batch
    batch = ragged_batch(steps=2)
    report, expected = await ours.step(batch), await theirs.step(batch)
    assert report.optimizer_steps == expected.optimizer_steps == 2
    assert report.metrics.keys() == expected.metrics.keys()
    for name in expected.metrics.keys() - {"seconds/forward_backward"}:
        assert report.metrics[name] == pytest.approx(expected.metrics[name], rel=2e-5, abs=1e-6), name
    mine, other = await asyncio.to_thread(weights, ours), weights(theirs)
    for name, weight in other.items():
        assert float((mine[name] - weight).abs().max()) < 2e-6, name


async def test_annotated_columns_are_the_torch_trainers(start: Start, moe: Path):
    ours = await start(moe, parallel={"data": 2, "expert": 2}, micro_batch_tokens=20)
    batch = ragged_batch()
    annotated = await ours.annotate(batch, frozenset({"old_logprobs", "ref_logprobs"}))
    expected = (await torch_twin(moe, ours).annotate(batch, frozenset({"old_logprobs"}))).array("old_logprobs")
    np.testing.assert_allclose(annotated.array("old_logprobs"), expected, atol=1e-5, rtol=0, equal_nan=True)
    np.testing.assert_array_equal(annotated.array("ref_logprobs"), annotated.array("old_logprobs"))
    assert annotated.array("old_logprobs").dtype == np.float32


@pytest.mark.parametrize("layout", [{"data": 2, "expert": 2}, {"tensor": 2, "expert": 2}], ids=str)
async def test_the_gradient_does_not_depend_on_micro_batches(start: Start, moe: Path, layout: dict[str, int]):
    """Also where the ranks have different numbers of them, or one has none: a single sample on two data-parallel ranks. No step is long
    enough to move a weight."""
    norms: dict[int, list[float]] = {0: [], 1: []}
    for tokens in (1, 45, 10_000):
        trainer = await start(moe, parallel=layout, micro_batch_tokens=tokens, lr=1e-30, weight_decay=0.0)
        for which, batch in enumerate((ragged_batch(), one_sample())):
            norms[which].append((await trainer.step(batch)).metrics["grad_norm"])
    for same_batch in norms.values():
        assert same_batch == pytest.approx([same_batch[0]] * 3, rel=1e-5)


def one_sample() -> Batch:
    batch = ragged_batch()
    one = Batch.of([batch.refs[0]])
    return one.with_columns({"advantages": np.ones(one.n_rows, np.float32)})


async def test_bfloat16_steps_reach_the_weights_through_float32_masters(start: Start, dense: Path, tmp_path: Path):
    """At lr 1e-6 a bfloat16 weight of 2⁻⁹ and more never moves by itself; the masters keep the float32 checkpoint's digits."""
    from safetensors.torch import load_file

    trainer = await start(dense, parallel=TWO, dtype="bfloat16", lr=1e-6, weight_decay=0.0)
    before = await asyncio.to_thread(weights, trainer)
    await trainer.save(tmp_path / "zero")
    masters = load_file(tmp_path / "zero/weights-stage0-tensor0.safetensors")
    source = load_file(dense / "model.safetensors")
    assert masters["embedding.word_embeddings.weight"].equal(source["model.embed_tokens.weight"])
    assert all(str(w.dtype) == "torch.bfloat16" and w.equal(source[n].bfloat16()) for n, w in before.items())

    await trainer.step(ragged_batch())
    await trainer.save(tmp_path / "one")
    moved = (
        load_file(tmp_path / "one/weights-stage0-tensor0.safetensors")["decoder.final_layernorm.weight"]
        - masters["decoder.final_layernorm.weight"]
    )
    assert float((moved.abs() - 1e-6).abs().median()) < 1e-7  # AdamW's first step is lr in every direction
    after = await asyncio.to_thread(weights, trainer)
    assert after["model.norm.weight"].equal(before["model.norm.weight"])  # too little for bfloat16, yet kept


async def test_recomputing_activations_changes_nothing(start: Start, moe: Path):
    reports = [(await (await start(moe, recompute=r)).step(ragged_batch())).metrics for r in (False, True)]
    assert reports[0]["grad_norm"] == pytest.approx(reports[1]["grad_norm"], rel=1e-6)


# What is refused, before anything is started


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"parallel": {"tensor": 4}}, "4 tensor-parallel ranks cannot share 2 key/value heads"),
        ({"parallel": {"expert": 2, "data": 2}}, "has no experts"),
        ({"role": "critic"}, "no scalar head yet, which a critic needs"),
        ({"schedule": "linear", "total_steps": 0}, "linear ends with the stage"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(cluster: Any, dense: Path, tmp_path: Path, options: dict[str, Any], complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        megatron_trainer(dense, tmp_path, cluster, **options)


async def test_there_must_be_a_cluster(dense: Path, tmp_path: Path):
    trainer = megatron_trainer(dense, tmp_path, None)
    with pytest.raises(ConfigError, match="set cluster: processes"):
        await trainer.start()
    with pytest.raises(RunError, match="before it was started"):
        await trainer.annotate(ragged_batch(), frozenset({"old_logprobs"}))
    await trainer.close()


async def test_a_checkpoint_that_lacks_weights_is_refused_by_all_ranks(start: Start, dense: Path, tmp_path: Path):
    path = without_weight(tmp_path / "lacking", dense, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        await start(path, parallel=TWO)


async def test_columns_that_need_another_model_are_refused(start: Start, dense: Path):
    trainer = await start(dense)
    with pytest.raises(ConfigError, match="cannot give 'values'"):
        await trainer.annotate(ragged_batch(), frozenset({"old_logprobs", "values"}))


async def test_a_model_without_a_loss_annotates_and_does_not_train(start: Start, dense: Path):
    trainer = await start(dense, losses={}, role="reference", parallel=TWO)
    annotated = await trainer.annotate(ragged_batch(), frozenset({"ref_logprobs"}))
    assert np.isfinite(annotated.array("ref_logprobs")[annotated.array("loss_mask")]).all()
    with pytest.raises(ConfigError, match="has no loss"):
        await trainer.step(ragged_batch())


@pytest.mark.parametrize("token", [VOCAB, -1])
async def test_a_token_outside_the_vocabulary_names_its_sample(start: Start, dense: Path, token: int):
    batch = ragged_batch()
    batch.refs[4].get().tokens[0] = token
    trainer = await start(dense)
    for call in (trainer.step(batch), trainer.annotate(batch, frozenset({"ref_logprobs"}))):
        with pytest.raises(DataError, match=rf"sample {batch.refs[4].id} holds token id {token}; .* 0 to {VOCAB - 1}"):
            await call


async def test_a_restricted_support_is_refused(start: Start, dense: Path):
    batch = ragged_batch()
    sample = batch.refs[2].get()
    sample.columns["support"] = Ragged.of([[int(t)] for t in sample.tokens], "int32")
    with pytest.raises(DataError, match=rf"sample {batch.refs[2].id} has a column 'support'"):
        await (await start(dense)).step(batch)


# Numbers that are not finite


def spoilt(batch: Batch, sample: int, value: float) -> Batch:
    advantages = batch.array("advantages").copy()
    advantages[batch.rows_of(np.array([sample]))] = value
    return batch.with_columns({"advantages": advantages})


LAYOUTS = [{"data": 2}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
async def test_a_loss_that_is_not_finite_names_step_and_sample_and_changes_nothing(start: Start, dense: Path, layout: dict[str, int]):
    trainer, undisturbed = [await start(dense, parallel=layout, micro_batch_tokens=40, lr=1e-2) for _ in range(2)]
    batch = ragged_batch()
    await trainer.step(batch)
    before = await asyncio.to_thread(weights, trainer)
    with pytest.raises(StepRefused, match=rf"optimizer step 2: loss 'policy' is nan from sample {batch.refs[-1].id}\. The weights are"):
        await trainer.step(spoilt(batch, len(batch) - 1, float("nan")))
    assert same(await asyncio.to_thread(weights, trainer), before)
    assert trainer.optimizer_steps == 1

    await trainer.step(batch)  # nothing of the failed step's gradient is left
    for _ in range(2):
        await undisturbed.step(batch)
    assert same(await asyncio.to_thread(weights, trainer), await asyncio.to_thread(weights, undisturbed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_gradient_that_is_not_finite_names_its_sample(start: Start, dense: Path, dtype: str):
    trainer = await start(dense, parallel=TWO, losses={"nll": {"use": "fixtures.megatron:steep"}}, dtype=dtype)
    batch, culprit = ragged_batch(), 7
    before = await asyncio.to_thread(weights, trainer)
    named = f"it comes from sample {batch.refs[culprit].id}. The weights"
    with pytest.raises(StepRefused, match=rf"optimizer step 1: the gradient's norm is (nan|inf), though the loss is finite; {named}"):
        await trainer.step(spoilt(batch, culprit, STEEP))
    assert same(await asyncio.to_thread(weights, trainer), before)


async def test_a_refusal_in_a_later_optimizer_step_keeps_the_first(start: Start, dense: Path):
    batch = ragged_batch(steps=2)
    second = int(next(s for s in batch.steps[1] if batch.segments.sequence_tokens[s]))
    trainer, undisturbed = [await start(dense, lr=1e-2) for _ in range(2)]
    with pytest.raises(RunError, match="optimizer step 2") as later:
        await trainer.step(spoilt(batch, second, float("nan")))
    assert not isinstance(later.value, StepRefused)
    assert trainer.optimizer_steps == 1
    await undisturbed.step(batch.with_steps([batch.steps[0]]))
    assert same(await asyncio.to_thread(weights, trainer), await asyncio.to_thread(weights, undisturbed))


async def test_a_batch_that_trains_nothing_is_refused(start: Start, dense: Path):
    batch = ragged_batch()
    empty = np.flatnonzero(batch.segments.sequence_tokens == 0)
    with pytest.raises(StepRefused, match="trains no token"):
        await (await start(dense)).step(batch.with_steps([empty]))


async def test_gates_stop_a_batch_before_it_changes_a_weight(start: Start, dense: Path):
    """The rollout's log-probabilities of these samples are made up: far from the model's own."""
    trainer = await start(dense, parallel=TWO, gates=NO_GATES | {"mismatch": 0.01}, lr=1e-2)
    trainer.version = 3
    before = await asyncio.to_thread(weights, trainer)
    with pytest.raises(StepRefused, match=r"optimizer step 1: mismatch/mean_abs is .* more than the bound 0.01 of a float32 trainer"):
        await trainer.step(ragged_batch())
    assert same(await asyncio.to_thread(weights, trainer), before)


# Plug-ins and ranks that fail


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
async def test_a_loss_that_is_not_one_number_a_row_is_a_sentence_and_the_ranks_go_on(start: Start, dense: Path, layout: dict[str, int]):
    trainer = await start(dense, parallel=layout, losses={"mean": {"use": "fixtures.megatron:scalar"}})
    with pytest.raises(PluginError, match=r"loss 'mean' gave \[\]"):
        await trainer.step(ragged_batch())
    await trainer.annotate(ragged_batch(), frozenset({"old_logprobs"}))


async def test_a_mistake_in_a_loss_comes_back_with_its_traceback(start: Start, dense: Path):
    trainer = await start(dense, parallel={"pipeline": 2}, losses={"mine": {"use": "fixtures.megatron:broken"}})
    with pytest.raises(RunError, match="rank 1 of 2 of trainer-policy failed in gradients: KeyError: 'no_such_column'") as failure:
        await trainer.step(ragged_batch())
    assert 'raise KeyError("no_such_column")' in str(failure.value.__cause__)
    with pytest.raises(RunError, match="its ranks were ended before"):
        await trainer.annotate(ragged_batch(), frozenset({"old_logprobs"}))


async def test_a_rank_that_dies_is_named(start: Start, dense: Path, tmp_path: Path):
    trainer = await start(dense, parallel=TWO)
    os.kill(pid_of_rank_1(tmp_path), signal.SIGKILL)
    with pytest.raises(RunError, match=r"rank 1 of 2 of trainer-policy died in annotate \(signal SIGKILL\)"):
        await trainer.annotate(ragged_batch(), frozenset({"old_logprobs"}))


def pid_of_rank_1(run_dir: Path) -> int:
    return int((run_dir / "logs/trainer-policy-rank-1.log").read_text().split("pid ")[1].split(",")[0])


async def test_a_rank_that_dies_in_the_first_optimizer_step_refuses_no_batch(start: Start, dense: Path, tmp_path: Path):
    """A refusal says that the weights are those before: here they are gone."""
    trainer = await start(dense, parallel=TWO)
    os.kill(pid_of_rank_1(tmp_path), signal.SIGKILL)
    with pytest.raises(RanksLost, match=r"^rank 1 of 2 of trainer-policy died in gradients \(signal SIGKILL\)"):
        await trainer.step(ragged_batch())


async def test_the_ranks_have_one_deadline_for_a_whole_step(cluster: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The gradients take all of it but a second, by a clock of ours; then rank 1 stops. It must be named when that second is over."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, perf_counter=lambda: 0.0)
    built = megatron_trainer(dense, tmp_path, cluster, parallel=TWO)
    trainer = built.config.build(replace(built.context, cluster=Slow(cluster, clock, tmp_path)))
    seconds = 0.95 * built.context.stage.deadlines.train
    monkeypatch.setattr("miles_train.ranks.trainer.time", clock)
    await trainer.start()
    clock.takes = seconds - 1
    try:
        with pytest.raises(
            RanksLost, match=r"the run waited 1 s for an optimizer step: ranks? (0, )?1 of 2 of trainer-policy did not answer step"
        ):
            await asyncio.wait_for(trainer.step(ragged_batch()), 60)
    finally:
        await trainer.close()


class Slow:
    """A cluster of a single group of ranks, which advance a clock when they are asked for gradients and stop when they are to step."""

    def __init__(self, cluster: Any, clock: Any, run_dir: Path) -> None:
        self.cluster, self.clock, self.run_dir = cluster, clock, run_dir

    async def start(self, *arguments: Any, **options: Any) -> Slow:
        self.ranks = await self.cluster.start(*arguments, **options)
        return self

    async def call(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        if method == "step":
            os.kill(pid_of_rank_1(self.run_dir), signal.SIGSTOP)
        result = await self.ranks.call(method, *arguments, **options)
        self.clock.now += self.clock.takes if method == "gradients" else 0
        return result

    async def close(self) -> None:
        await self.ranks.close()


# Weights


async def test_weights_come_bucket_by_bucket_and_may_be_left_half_way(start: Start, moe: Path):
    from safetensors.torch import load_file

    trainer = await start(moe, parallel={"data": 2, "expert": 2}, bucket_bytes=8192)
    source = load_file(moe / "model.safetensors")

    def first_two() -> list[tuple[str, Any]]:
        iterator = trainer.named_weights()
        found = [next(iterator), next(iterator)]
        iterator.close()
        return found

    for name, tensor in await asyncio.to_thread(first_two):
        assert tensor.equal(source[name])
    assert same(await asyncio.to_thread(weights, trainer), source)


async def test_greedy_tokens_have_no_log_probability_to_annotate(start: Start, dense: Path):
    sample = ragged_batch().refs[0].get()
    first, second = sample.spans
    greedy = replace(sample, spans=[replace(first, temperature=0.0), second])
    trainer = await start(dense, parallel={"context": 2})
    annotated = await trainer.annotate(Batch.of([SampleRef.of(greedy)]), frozenset({"old_logprobs"}))
    nan = np.flatnonzero(np.isnan(annotated.array("old_logprobs")))
    assert nan.tolist() == [*range(first.start - 1, first.end - 1), len(sample) - 1]
