"""Gates: a batch whose rollout log-probabilities cannot be the trainer's is refused before a weight changes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.training import build_trainer, ragged_batch, same, toy_ppo, weights, write_scalar_model
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from miles_core.batch import Batch
from miles_core.errors import RunError, StepRefused
from miles_core.protocols import LossInputs, LossOutputs, LossTerm
from miles_core.refs import SampleRef
from miles_train.gates import MISMATCH, check_gates
from miles_train.mismatch import mismatch_metrics
from miles_train.plugins import Gates, TorchTrainerConfig

DEFAULT: dict[str, Any] = {"gates": {}}


async def sampled(path: Path, version: int = 3, **options: Any) -> Batch:
    """``ragged_batch`` as if the model itself had sampled it: every sampled token by ``version``, with the model's log-probabilities."""
    batch = ragged_batch()
    trainer = build_trainer(path, losses={}, **options)
    annotated = await trainer.annotate(batch, frozenset({"old_logprobs"}))
    for ref, logprobs in zip(batch.refs, annotated.unpack("old_logprobs"), strict=True):
        sample = ref.get()
        was = sample.versions >= 0
        sample.logprobs[:] = np.where(was, logprobs, np.nan)
        sample.versions[:] = np.where(was, version, -1)
    fresh = Batch.of([SampleRef.of(r.get()) for r in batch.refs])
    return fresh.with_columns({"advantages": batch.array("advantages")})


def moved(batch: Batch, by: float | np.ndarray) -> Batch:
    """As an engine would record whose log-probabilities are off by so much."""
    return batch.with_columns({"logprobs": (batch.array("logprobs") + by).astype(np.float32)})


def at(version: int, path: Path, **options: Any) -> Any:
    trainer = build_trainer(path, **(DEFAULT | options))
    trainer.version = version
    return trainer


@pytest.mark.parametrize("dtype, off", [("float32", 0.02), ("bfloat16", 0.2)])
async def test_a_mismatch_out_of_bounds_refuses_the_step_and_changes_nothing(dense: Path, dtype: str, off: float):
    good = await sampled(dense, dtype=dtype)
    trainer, undisturbed = at(3, dense, dtype=dtype, lr=1e-2), at(3, dense, dtype=dtype, lr=1e-2)
    before = weights(trainer)
    with pytest.raises(StepRefused) as refused:
        await trainer.step(moved(good, off))
    said = str(refused.value)
    assert f"mismatch/mean_abs is {off:.1g}" in said and f"bound {MISMATCH[dtype]:g} of a {dtype} trainer" in said
    for place in ("optimizer step 1", "weight sync", "dtype", "temperature", "top_p", "trainer.gates.mismatch", "weights are those before"):
        assert place in said
    assert same(weights(trainer), before) and trainer.optimizer_steps == 0

    reports = [await t.step(good) for t in (trainer, undisturbed)]  # nothing of the refused step is left
    assert reports[0].metrics["grad_norm"] == reports[1].metrics["grad_norm"]
    assert same(weights(trainer), weights(undisturbed)) and not same(weights(trainer), before)


@pytest.mark.parametrize("dtype, off", [("float32", 0.002), ("bfloat16", 0.05)])
async def test_what_is_usual_in_a_precision_passes(dense: Path, dtype: str, off: float):
    """0.05 is usual in bfloat16 and refused in float32."""
    report = await at(3, dense, dtype=dtype).step(moved(await sampled(dense, dtype=dtype), off))
    assert report.metrics["mismatch/mean_abs"] == pytest.approx(off, rel=0.1)
    assert report.metrics["mismatch/ess"] == pytest.approx(1, abs=1e-2)


async def test_a_bound_of_the_recipe_replaces_the_default(dense: Path):
    batch = moved(await sampled(dense), 0.02)
    with pytest.raises(StepRefused, match=r"more than the bound 0\.01 "):
        await at(3, dense, gates={"mismatch": 0.01}).step(batch)
    assert (await at(3, dense, gates={"mismatch": 0.03}).step(batch)).optimizer_steps == 1


async def test_few_tokens_that_carry_all_the_weight_are_refused(dense: Path):
    """One token that the trainer finds e⁶ times as likely: the mean hardly shows it, the effective sample size does."""
    batch = await sampled(dense)
    off = np.zeros(batch.n_rows)
    off[np.flatnonzero(batch.array("loss_mask"))[0]] = -6
    trainer = at(3, dense, gates={"mismatch": 1.0})
    before = weights(trainer)
    with pytest.raises(
        StepRefused, match=r"mismatch/ess is 0\.0\d+, less than the bound 0\.3: a few tokens carry the weight of all.*gates\.ess"
    ):
        await trainer.step(moved(batch, off))
    assert same(weights(trainer), before)
    report = await at(3, dense, gates={"mismatch": 1.0, "ess": 0.0}).step(moved(batch, off))
    assert report.metrics["mismatch/ess"] < 0.1 and report.metrics["mismatch/mean_abs"] < 1


SKIPPING = {"policy": LossTerm(toy_ppo, proportional_to_advantage=True)}


@pytest.mark.parametrize("kept", ["one", "none"])
async def test_skipped_samples_are_compared_before_the_step(dense: Path, kept: str):
    """One sample has an advantage, or none has; what the engine recorded of all others is wrong."""
    batch = await sampled(dense)
    counts = batch.segments.sequence_tokens
    only = np.flatnonzero(counts > 0)[0]
    moves = (batch.segment == only) & (kept == "one")
    batch = batch.with_columns({"advantages": np.where(moves, 1.0, 0.0).astype(np.float32)})
    report = await at(3, dense, losses=SKIPPING).step(batch)
    assert report.metrics["skipped"] > 0.5 and report.metrics["mismatch/tokens"] == batch.segments.tokens
    trainer = at(3, dense, losses=SKIPPING)
    before = weights(trainer)
    with pytest.raises(StepRefused, match="mismatch/mean_abs"):
        await trainer.step(moved(batch, np.where(batch.segment == only, 0.0, 0.1)))
    assert same(weights(trainer), before)


async def test_enough_is_compared_and_no_more_unless_every_bit_counts(dense: Path, monkeypatch: pytest.MonkeyPatch):
    from miles_train import driver as module

    batch = await sampled(dense)
    counts = batch.segments.sequence_tokens
    first = np.flatnonzero(counts > 0)[0]
    batch = batch.with_columns({"advantages": (batch.segment == first).astype(np.float32)})
    monkeypatch.setattr(module, "ENOUGH", int(counts[: first + 2].sum()) + 1)
    trainer = at(3, dense, losses=SKIPPING)
    compared = (await trainer.step(batch)).metrics["mismatch/tokens"]
    assert module.ENOUGH <= compared < module.ENOUGH + counts.max() and compared < counts.sum()
    trainer = at(3, dense, losses=SKIPPING)
    trainer.context = replace(trainer.context, bitwise=True)
    with pytest.raises(StepRefused, match=r"max_abs is 0\.001 nats, and numerics: bitwise"):  # the last sample's
        await trainer.step(moved(batch, np.where(batch.segment == np.flatnonzero(counts > 0)[-1], 0.001, 0.0)))


async def test_older_tokens_are_reported_and_never_gated(dense: Path):
    """All tokens are of version 3, the weights of version 5: drift, however large."""
    report = await at(5, dense).step(moved(await sampled(dense), 2.0))
    assert report.metrics["drift/age_2/mean_abs"] == pytest.approx(2, rel=1e-4)
    assert not any(name.startswith("mismatch") for name in report.metrics)


async def test_only_fresh_tokens_count_where_there_are_both(dense: Path):
    batch = await sampled(dense)
    old = batch.segment % 2 == 0
    versions = np.where(old & (batch.array("versions") >= 0), 2, batch.array("versions")).astype(np.int32)
    report = await at(3, dense).step(moved(batch, np.where(old, 3.0, 0.0)).with_columns({"versions": versions}))
    assert report.metrics["mismatch/mean_abs"] < 1e-5
    assert report.metrics["drift/age_1/mean_abs"] == pytest.approx(3, rel=1e-4)


async def test_later_optimizer_steps_are_not_gated(dense: Path):
    """By then the policy has moved on purpose."""
    batch = await sampled(dense)
    every = np.arange(len(batch))
    seen: list[float] = []

    def looks(inputs: LossInputs) -> LossOutputs:
        mask = inputs.ops.mask
        seen.append(float((inputs.logprobs - inputs.columns["logprobs"])[mask].detach().abs().mean()))
        return toy_ppo(inputs)

    report = await at(3, dense, lr=0.05, losses={"policy": looks}, micro_batch_tokens=10_000).step(batch.with_steps([every, every]))
    assert report.optimizer_steps == 2
    assert seen[0] < 1e-5 and seen[1] > MISMATCH["float32"]


async def test_the_first_optimizer_step_is_the_first_that_trains_something(dense: Path):
    batch = await sampled(dense)
    empty, full = (np.flatnonzero((batch.segments.sequence_tokens > 0) == x) for x in (False, True))
    assert len(empty)
    with pytest.raises(StepRefused, match="mismatch/mean_abs"):
        await at(3, dense).step(moved(batch, 1.0).with_steps([empty, full]))


async def test_tokens_that_nobody_sampled_are_not_gated(dense: Path):
    batch = ragged_batch()
    for ref in batch.refs:
        ref.get().versions[:], ref.get().logprobs[:] = -1, np.nan

    def nll(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(-inputs.logprobs)

    read = Batch.of([SampleRef.of(r.get()) for r in batch.refs])
    assert (await at(-1, dense, losses={"nll": nll}).step(read)).optimizer_steps == 1


async def test_a_critic_has_no_mismatch(dense: Path, tmp_path: Path):
    def square(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(inputs.values**2)

    critic = at(3, write_scalar_model(tmp_path, dense), role="critic", losses={"value": square})
    report = await critic.step(moved(await sampled(dense), 5.0))
    assert not any("mismatch" in name for name in report.metrics)


@pytest.mark.parametrize("recorded", [float("nan"), float("-inf")])
async def test_a_log_probability_that_is_none_is_out_of_bounds(dense: Path, recorded: float):
    batch = await sampled(dense)
    logprobs = batch.array("logprobs").copy()
    logprobs[np.flatnonzero(batch.array("loss_mask"))[3]] = recorded
    batch = batch.with_columns({"logprobs": logprobs})

    def nll(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(-inputs.logprobs)

    for gates in ({"ess": 0}, {"mismatch": float("inf")}):  # neither the mean nor the effective sample size is a number
        with pytest.raises(StepRefused, match=r"is (nan|inf)"):
            await at(3, dense, losses={"nll": nll}, gates=gates).step(batch)
    assert (await at(3, dense, losses={"nll": nll}, gates={"mismatch": float("inf"), "ess": 0}).step(batch)).optimizer_steps == 1


# Without a trainer


def gate(differences: list[float], gates: Gates, dtype: str = "float32") -> None:
    d = np.array(differences)
    check_gates(mismatch_metrics(d - 1, np.full(len(d), -1.0), np.zeros(len(d), int), 0), gates, dtype)


def test_the_bounds_themselves_are_inside():
    gate([0.5, -0.5], Gates(mismatch=0.5, ess=0))
    with pytest.raises(RunError, match=r"mean_abs is 0\.5"):
        gate([0.5, -0.5], Gates(mismatch=0.499, ess=0))
    weights = np.exp([0.5, -0.5])
    ess = weights.sum() ** 2 / (2 * (weights**2).sum())
    gate([0.5, -0.5], Gates(mismatch=1, ess=ess - 1e-9))
    with pytest.raises(RunError, match="mismatch/ess is"):
        gate([0.5, -0.5], Gates(mismatch=1, ess=ess + 1e-9))


@given(
    differences=st.lists(st.floats(-30, 30), min_size=1, max_size=8),
    ages=st.lists(st.integers(-1, 2), min_size=8, max_size=8),
    mismatch=st.none() | st.floats(1e-4, 20),
    ess=st.floats(0, 0.99),
    dtype=st.sampled_from(sorted(MISMATCH)),
)
def test_a_batch_passes_if_and_only_if_its_fresh_tokens_are_within_bounds(
    differences: list[float], ages: list[int], mismatch: float | None, ess: float, dtype: str
):
    """Age −1: nobody sampled it. By the formulas, token by token; what is within rounding of a bound may go either way."""
    n = len(differences)
    versions = np.array([-1 if age < 0 else 7 - age for age in ages[:n]])
    recorded = np.array([np.nan if v < 0 else -1.0 for v in versions])
    fresh = [d for d, v in zip(differences, versions, strict=True) if v == 7]
    refused = False
    if fresh:
        mean_abs = sum(abs(d) for d in fresh) / len(fresh)
        weights = [math.exp(d) for d in fresh]
        size = sum(weights) ** 2 / sum(w * w for w in weights) / len(fresh)
        bound = {"float32": 0.005, "bfloat16": 0.1}[dtype] if mismatch is None else mismatch
        assume(abs(mean_abs - bound) > 1e-6 and abs(size - ess) > 1e-6)
        refused = mean_abs > bound or size < ess
    metrics = mismatch_metrics(np.array(differences) - 1, recorded, versions, 7)
    with pytest.raises(RunError, match="mismatch/") if refused else nullcontext():
        check_gates(metrics, Gates(mismatch=mismatch, ess=ess), dtype)


def test_sample_size_does_not_overflow():
    """e⁸⁰⁰ is no float64; that only one of four tokens counts is seen all the same."""
    metrics = mismatch_metrics(np.array([0.0, 0, 0, 0]), np.array([-800.0, 0, 0, 0]), np.zeros(4, int), 0)
    assert metrics["mismatch/ess"] == pytest.approx(0.25)
    assert metrics["mismatch/k3"] == float("inf")


@pytest.mark.parametrize("wrong", [{"mismatch": 0}, {"mismatch": float("nan")}, {"ess": 1}, {"ess": -0.1}, {"max": 1}])
def test_bounds_that_make_no_sense_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValidationError):
        TorchTrainerConfig.model_validate({"use": "torch", "gates": wrong})


def test_a_bound_survives_the_resolved_configuration():
    """``.inf`` written to YAML and read back is not the default."""
    import yaml

    config = TorchTrainerConfig.model_validate({"use": "torch", "gates": {"mismatch": float("inf"), "ess": 0}})
    read = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert TorchTrainerConfig.model_validate(read) == config
