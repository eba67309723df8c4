"""What `trainer: torch` promises besides its numbers (those are in tests/differential): masters, refusals, reports, threads."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.training import VOCAB, build_trainer, ragged_batch, same, toy_ppo, weights, write_model

from miles_core.batch import Batch
from miles_core.columns import Ragged
from miles_core.errors import ConfigError, DataError, PluginError, RunError, StepRefused
from miles_core.protocols import LossInputs, LossOutputs, LossTerm
from miles_core.refs import SampleRef

SMALL: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


def nll(inputs: LossInputs) -> LossOutputs:
    return LossOutputs(-inputs.logprobs)


# bfloat16


async def test_small_steps_reach_bfloat16_weights_through_the_masters(dense: Path, tmp_path: Path):
    """At lr 1e-6, weights of 2⁻⁹ and more never move in naive bfloat16 AdamW: half their spacing is more than 3.8e-6."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    bf16 = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(bf16)
    trainer = build_trainer(bf16, losses={"nll": nll}, dtype="bfloat16", lr=1e-6, weight_decay=0.0)
    start, batch = weights(trainer), ragged_batch()
    large = {name: w.abs() >= 2**-9 for name, w in start.items()}

    await trainer.step(batch)
    await trainer.save(tmp_path / "one")
    masters = load_file(tmp_path / "one/weights.safetensors")
    moved = masters["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"].float()
    assert float((moved.abs() - 1e-6).abs().median()) < 1e-7  # AdamW's first step is lr in every direction
    assert all(w[large[n]].equal(start[n][large[n]]) for n, w in trainer.named_weights())

    for _ in range(29):
        await trainer.step(batch)
    await trainer.save(tmp_path / "thirty")
    masters = load_file(tmp_path / "thirty/weights.safetensors")
    now = weights(trainer)
    assert all(now[n].equal(masters[n].bfloat16()) for n in now)
    assert sum(int((now[n] != start[n])[large[n]].sum()) for n in now) > 100

    naive = AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16)
    adamw = torch.optim.AdamW(naive.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = torch.from_numpy(batch.refs[0].get().tokens).long()[None]
    for _ in range(30):
        naive(tokens, labels=tokens).loss.backward()
        adamw.step()
        adamw.zero_grad()
    assert all(w[large[n]].equal(start[n][large[n]]) for n, w in naive.named_parameters())


async def test_a_bfloat16_run_keeps_the_digits_of_a_float32_checkpoint(dense: Path, tmp_path: Path):
    from safetensors.torch import load_file

    trainer = build_trainer(dense, dtype="bfloat16")
    await trainer.save(tmp_path)
    assert same(load_file(tmp_path / "weights.safetensors"), load_file(dense / "model.safetensors"))


def test_without_a_loss_there_is_no_second_copy_of_the_weights(dense: Path):
    reference = build_trainer(dense, losses={}, dtype="bfloat16")
    assert all(str(w.dtype) == "torch.bfloat16" for _, w in reference.named_weights())


# What is refused


@pytest.mark.parametrize(
    "config",
    [
        dict(model_type="gemma2", final_logit_softcapping=30.0, **SMALL),
        dict(model_type="granite", logits_scaling=8.0, **SMALL),
        dict(model_type="cohere", logit_scale=0.0625, **{k: v for k, v in SMALL.items() if k != "head_dim"}),
    ],
    ids=lambda c: c["model_type"],
)
def test_models_that_change_their_logits_are_refused(tmp_path: Path, config: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"logits of \w+ForCausalLM are not hidden @ lm_head.weight.T"):
        build_trainer(write_model(tmp_path, **config))


@pytest.mark.parametrize(
    "config",
    [
        dict(model_type="lfm2", layer_types=["conv", "full_attention"], **{k: v for k, v in SMALL.items() if k != "head_dim"}),
        dict(model_type="falcon", vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    ],
    ids=lambda c: c["model_type"],
)
def test_packing_is_refused_where_samples_would_see_each_other(tmp_path: Path, config: dict[str, Any]):
    path = write_model(tmp_path, **config)
    build_trainer(path, layout="padded")
    with pytest.raises(ConfigError, match="use layout: auto or padded"):
        build_trainer(path, layout="packed")


MOE: dict[str, Any] = dict(num_experts_per_tok=2, sliding_window=12)


@pytest.mark.parametrize(
    "config",
    [
        dict(model_type="qwen2_moe", num_experts=4, use_sliding_window=True, max_window_layers=2, moe_intermediate_size=16,
             shared_expert_intermediate_size=16, **MOE, **SMALL),
        dict(model_type="phimoe", num_local_experts=4, **MOE, **SMALL),
    ],
    ids=lambda c: c["model_type"],
)  # fmt: skip
def test_a_window_that_only_the_mask_knows_is_not_lost(tmp_path: Path, config: dict[str, Any]):
    path = write_model(tmp_path, **config)
    trainer = build_trainer(path)
    assert trainer.model.layouts == ("padded",) and trainer.model.hf.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="use layout: auto or padded"):
        build_trainer(path, layout="packed")


def test_windows_that_layers_pass_on_are_packed(tmp_path: Path):
    config = dict(model_type="mixtral", num_local_experts=4, **MOE, **SMALL)
    trainer = build_trainer(write_model(tmp_path, **config))
    assert "packed" in trainer.model.layouts
    windows = [trainer.model.hf.config.sliding_window, *(getattr(m, "sliding_window", 12) for m in trainer.model.hf.modules())]
    assert set(windows) == {12}  # as they were before the model was looked at


def test_a_model_that_fails_when_it_is_looked_at_stays_as_it_was(tmp_path: Path):
    """Doge adds a mask of its own to the one it was given."""
    path = write_model(tmp_path, model_type="doge", **SMALL)
    trainer = build_trainer(path)
    assert trainer.model.layouts == ("padded",) and trainer.model.hf.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="use layout: auto or padded"):
        build_trainer(path, layout="packed")


async def test_a_model_without_attention_heads_is_trained_padded(tmp_path: Path):
    path = write_model(tmp_path, model_type="mamba", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    for layout in ("auto", "padded"):
        assert (await build_trainer(path, layout=layout).step(ragged_batch())).optimizer_steps == 1


async def test_a_soft_cap_on_attention_is_kept(tmp_path: Path):
    """Against transformers' eager attention: its sdpa leaves the cap out."""
    import torch
    from transformers import AutoModelForCausalLM

    config = SMALL | dict(model_type="gemma2", attn_logit_softcapping=0.05, final_logit_softcapping=None, query_pre_attn_scalar=1)
    path, batch = write_model(tmp_path, initializer_range=0.3, **config), ragged_batch()
    sample = batch.select([0]).refs[0].get()
    found = (await build_trainer(path).annotate(batch.select([0]), frozenset({"old_logprobs"}))).array("old_logprobs")[:-1]
    tokens, temperatures = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.temperatures()[1:, None])

    def expected(attention: str) -> np.ndarray:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation=attention).eval()
        with torch.no_grad():
            logp = torch.log_softmax(model(tokens[None]).logits[0, :-1] / temperatures, -1)
        return logp.gather(1, tokens[1:, None])[:, 0].numpy()

    np.testing.assert_allclose(found, expected("eager"), atol=2e-5, rtol=0)
    assert np.abs(found - expected("sdpa")).max() > 1e-2


def test_a_checkpoint_that_lacks_weights_is_refused(dense: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        build_trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        build_trainer(tmp_path / "nowhere")


def test_a_schedule_without_an_end_is_refused(dense: Path):
    with pytest.raises(ConfigError, match="linear ends with the stage"):
        build_trainer(dense, schedule="linear", total_steps=0)


async def test_columns_that_need_another_model_are_refused(dense: Path):
    with pytest.raises(ConfigError, match="cannot give 'values'"):
        await build_trainer(dense).annotate(ragged_batch(), frozenset({"old_logprobs", "values"}))


async def test_a_model_without_a_loss_does_not_train(dense: Path):
    with pytest.raises(ConfigError, match="has no loss"):
        await build_trainer(dense, losses={}).step(ragged_batch())


@pytest.mark.parametrize("token", [VOCAB, -1])
async def test_a_token_outside_the_vocabulary_names_its_sample(dense: Path, token: int):
    batch = ragged_batch()
    batch.refs[4].get().tokens[0] = token
    trainer = build_trainer(dense)
    before = weights(trainer)
    for call in (trainer.step(batch), trainer.annotate(batch, frozenset({"ref_logprobs"}))):
        with pytest.raises(DataError, match=rf"sample {batch.refs[4].id} holds token id {token}; .* 0 to {VOCAB - 1}"):
            await call
    assert same(weights(trainer), before)


async def test_a_restricted_support_is_refused(dense: Path):
    """Its log-probabilities are of another distribution than the model's own."""
    batch = ragged_batch()
    sample = batch.refs[2].get()
    sample.columns["support"] = Ragged.of([[int(t)] for t in sample.tokens], "int32")
    with pytest.raises(DataError, match=rf"sample {batch.refs[2].id} has a column 'support'"):
        await build_trainer(dense).step(batch)


# Numbers that are not finite


def poisoned(batch: Batch, row: int, value: float) -> Batch:
    advantages = batch.array("advantages").copy()
    advantages[row] = value
    return batch.with_columns({"advantages": advantages})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_a_loss_that_is_not_finite_names_step_and_sample_and_changes_nothing(dense: Path, value: float):
    batch = ragged_batch()
    row = int(np.flatnonzero(batch.array("loss_mask"))[-1])
    trainer = build_trainer(dense, micro_batch_tokens=40)
    await trainer.step(batch)
    before = weights(trainer)
    with pytest.raises(RunError, match=rf"optimizer step 2: loss 'policy' is .* from sample {batch.refs[-1].id}\. "):
        await trainer.step(poisoned(batch, row, value))
    assert same(weights(trainer), before)
    assert trainer.optimizer_steps == 1

    undisturbed = build_trainer(dense, micro_batch_tokens=40)
    await undisturbed.step(batch)
    await undisturbed.step(batch)
    await trainer.step(batch)  # nothing of the failed step's gradient is left
    assert same(weights(trainer), weights(undisturbed))


STEEP = 7.0
"""Rows with this advantage have a loss of infinite slope."""


def steep(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood; where the advantage says so, plus √0, whose value is finite and whose slope is not."""
    import torch

    flat = inputs.columns["advantages"] != STEEP
    root = torch.where(flat, 1.0, inputs.logprobs - inputs.logprobs.detach()).sqrt()
    return LossOutputs(-inputs.logprobs + torch.where(flat, 0.0, root))


def steep_in(batch: Batch, sample: int) -> Batch:
    return poisoned(batch, batch.rows_of(np.array([sample])), STEEP)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 10_000])
async def test_a_gradient_that_is_not_finite_names_its_sample_and_changes_nothing(dense: Path, dtype: str, micro_batch_tokens: int):
    """The loss is finite, so that nothing is known before all samples have been gone through."""
    batch = ragged_batch()
    options: dict[str, Any] = dict(losses={"nll": steep}, dtype=dtype, lr=1e-2, micro_batch_tokens=micro_batch_tokens)
    trainer, undisturbed = build_trainer(dense, **options), build_trainer(dense, **options)
    before = weights(trainer)
    culprit = 7
    named = f"it comes from sample {batch.refs[culprit].id}. The weights"
    with pytest.raises(StepRefused, match=rf"optimizer step 1: the gradient's norm is (nan|inf), though the loss is finite; {named}"):
        await trainer.step(steep_in(batch, culprit))
    assert same(weights(trainer), before)
    assert trainer.optimizer_steps == 0

    await trainer.step(batch)  # nothing of the search is left
    await undisturbed.step(batch)
    assert same(weights(trainer), weights(undisturbed))


async def test_a_gradient_that_is_not_finite_names_all_samples_of_a_unit(dense: Path):
    """Branches of a trajectory for most losses, a group for those that are functions of groups."""
    batch = ragged_batch()
    group, trajectory = batch.segments.group, batch.segments.trajectory
    for unit, members in (("token", trajectory == trajectory[0]), ("group", group == group[0])):
        trainer = build_trainer(dense, losses={"nll": LossTerm(steep, unit=unit)})
        named = ", ".join(str(batch.refs[s].id) for s in np.flatnonzero(members))
        assert members.sum() == (2 if unit == "token" else 4)
        with pytest.raises(StepRefused, match=rf"one of the samples {named}\."):
            await trainer.step(steep_in(batch, 0))


async def test_a_sum_of_gradients_that_overflows_is_no_samples_fault(dense: Path):
    """Two equal samples, each with a gradient of norm 1.2e19; squares of norms are float32 up to 1.8e19."""
    sample = ragged_batch().refs[0].get()
    copies = [replace(sample, id=replace(sample.id, trajectory=t)) for t in range(2)]
    scale = 1.0

    def huge(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(-inputs.logprobs * scale)

    batch = Batch.of([SampleRef.of(s) for s in copies])
    scale = 1.2e19 * 2 / (await build_trainer(dense, losses={"nll": huge}).step(batch)).metrics["grad_norm"]
    with pytest.raises(StepRefused, match="so is each sample's own gradient: only their sum is not"):
        await build_trainer(dense, losses={"nll": huge}).step(batch)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
async def test_a_refusal_says_whether_this_call_had_changed_anything(dense: Path, fault: str):
    """In the first optimizer step nothing had; in the second the first one's update stays."""
    batch = ragged_batch(steps=2)
    samples = [int(np.flatnonzero(batch.select(s).segments.sequence_tokens)[0]) for s in batch.steps]
    first, second = (int(step[s]) for step, s in zip(batch.steps, samples, strict=True))

    def spoilt(sample: int) -> Batch:
        return steep_in(batch, sample) if fault == "gradient" else poisoned(batch, batch.rows_of(np.array([sample])), float("nan"))

    def loss(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(steep(inputs).loss + 0 * inputs.columns["advantages"])

    trainer, undisturbed = (build_trainer(dense, losses={"nll": loss}, lr=1e-2) for _ in range(2))
    before = weights(trainer)
    with pytest.raises(StepRefused, match="optimizer step 1"):
        await trainer.step(spoilt(first))
    assert same(weights(trainer), before)
    with pytest.raises(RunError, match="optimizer step 2") as later:
        await trainer.step(spoilt(second))
    assert not isinstance(later.value, StepRefused)
    assert trainer.optimizer_steps == 1
    await undisturbed.step(batch.with_steps([batch.steps[0]]))
    assert same(weights(trainer), weights(undisturbed)) and not same(weights(trainer), before)


async def test_what_is_not_trained_cannot_poison_what_is(dense: Path):
    """Rows outside the mask hold NaN log-probabilities of the rollout (nobody sampled them) and here NaN advantages too."""
    batch = ragged_batch()
    clean, dirty = build_trainer(dense), build_trainer(dense)
    untrained = ~batch.array("loss_mask")
    assert np.isnan(batch.array("logprobs")[untrained]).any()
    report = await dirty.step(poisoned(batch, untrained, float("nan")))
    expected = await clean.step(batch)
    assert report.metrics["grad_norm"] == expected.metrics["grad_norm"]
    assert same(weights(dirty), weights(clean))


# Losses and reports


async def test_a_loss_that_is_not_one_number_a_row_is_refused(dense: Path):
    trainer = build_trainer(dense, losses={"mean": lambda inputs: LossOutputs(-inputs.logprobs.mean())})
    with pytest.raises(PluginError, match=r"loss 'mean' gave \[\]"):
        await trainer.step(ragged_batch())


@pytest.mark.parametrize("metric", ["ratio", "entropy", "loss", "loss/policy"])
async def test_two_metrics_of_one_name_are_refused(dense: Path, metric: str):
    def other(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(inputs.entropy, {metric: inputs.entropy})

    trainer = build_trainer(dense, losses={"policy": toy_ppo, "other": other})
    with pytest.raises(PluginError, match=f"loss 'other' reports the metric '{metric}'"):
        await trainer.step(ragged_batch())


async def test_terms_add_up_and_are_reported_apart(dense: Path):
    batch = ragged_batch()
    both = (await build_trainer(dense, losses={"policy": toy_ppo, "nll": nll}).step(batch)).metrics
    policy = (await build_trainer(dense).step(batch)).metrics
    sft = (await build_trainer(dense, losses={"nll": nll}).step(batch)).metrics
    assert both["loss/policy"] == pytest.approx(policy["loss"], rel=1e-6)
    assert both["loss/nll"] == pytest.approx(sft["loss"], rel=1e-6)
    assert both["loss"] == pytest.approx(policy["loss"] + sft["loss"], rel=1e-6)


async def test_optimizer_steps_without_a_trained_token_are_passed_over(dense: Path):
    batch = ragged_batch()
    empty = np.flatnonzero(batch.segments.sequence_tokens == 0)
    full = np.flatnonzero(batch.segments.sequence_tokens)
    report = await build_trainer(dense).step(batch.with_steps([empty, full]))
    assert report.optimizer_steps == 1
    assert report.metrics["tokens"] == batch.segments.tokens
    with pytest.raises(StepRefused, match="trains no token"):
        await build_trainer(dense).step(batch.with_steps([empty]))


async def test_the_schedule_counts_optimizer_steps(dense: Path):
    """Two calls of three optimizer steps each, falling linearly to 0 over the six."""
    trainer = build_trainer(dense, lr=0.6, schedule="linear", final_lr_ratio=0.0, total_steps=2)
    rates = [(await trainer.step(ragged_batch(steps=3))).metrics["lr"] for _ in range(2)]
    assert rates == pytest.approx([0.4, 0.1])  # the third and the sixth of 0.6, 0.5, 0.4, 0.3, 0.2, 0.1
    assert trainer.optimizer_steps == 6


async def test_greedy_tokens_have_no_log_probability_to_annotate(dense: Path):
    batch = ragged_batch()
    sample = batch.refs[0].get()
    first, second = sample.spans
    greedy = replace(sample, spans=[replace(first, temperature=0.0), second])
    annotated = await build_trainer(dense).annotate(Batch.of([SampleRef.of(greedy)]), frozenset({"old_logprobs"}))
    nan = np.flatnonzero(np.isnan(annotated.array("old_logprobs")))
    assert nan.tolist() == [*range(first.start - 1, first.end - 1), len(sample) - 1]


async def test_the_event_loop_stays_alive_during_a_step(dense: Path):
    """The loss waits for something that only the event loop can give."""
    released = threading.Event()

    def waits(inputs: LossInputs) -> LossOutputs:
        assert released.wait(30)
        return toy_ppo(inputs)

    step = asyncio.create_task(build_trainer(dense, losses={"policy": waits}).step(ragged_batch()))
    await asyncio.sleep(0)
    released.set()
    assert (await step).optimizer_steps == 1


async def test_closing_ends_the_trainers_thread(dense: Path):
    before = set(threading.enumerate())
    trainer = build_trainer(dense)
    await trainer.annotate(ragged_batch(), frozenset({"old_logprobs"}))
    (worker,) = set(threading.enumerate()) - before
    await trainer.close()
    assert not worker.is_alive()
