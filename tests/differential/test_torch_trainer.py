"""`trainer: torch` against plain torch: one sample at a time through ``model(...).logits``, log_softmax and torch.optim.AdamW.

The reference shares no code with the trainer: no packing, no padding, no micro-batches, whole logits, sums written out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.training import CUTS, MODELS, build_trainer, gradient, ragged_batch, ragged_sample, same, toy_ppo, weights, write_model

from miles_core.batch import Batch
from miles_core.protocols import LossInputs, LossOutputs, LossTerm
from miles_core.refs import SampleRef

COLUMNS = frozenset({"old_logprobs"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name), **config) for name, config in MODELS.items()}


def plain_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def plain_logprobs(model: Any, batch: Batch) -> tuple[Any, Any]:
    """Log-probability and entropy [N] of the predicted tokens at their temperatures, one sample at a time; NaN on last rows."""
    import torch

    logprobs, entropies = [], []
    for ref in batch.refs:
        sample = ref.get()
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        temperatures = torch.from_numpy(sample.temperatures()[1:, None])
        logp = torch.log_softmax(model(tokens[None]).logits[0, :-1] / temperatures, -1)
        nan = torch.full((1,), torch.nan)
        logprobs += [logp.gather(1, tokens[1:, None])[:, 0], nan]
        entropies += [-(logp.exp() * logp).sum(-1), nan]
    return torch.cat(logprobs), torch.cat(entropies)


# Log-probabilities


@pytest.mark.parametrize(
    "layout, micro_batch_tokens", [("padded", 1), ("padded", 60), ("padded", 10_000), ("packed", 50), ("packed", 10_000)]
)
@pytest.mark.parametrize("name", list(MODELS))
async def test_annotate(models: dict[str, Path], name: str, layout: str, micro_batch_tokens: int):
    import torch

    batch = ragged_batch()
    trainer = build_trainer(models[name], layout=layout, micro_batch_tokens=micro_batch_tokens)
    annotated = await trainer.annotate(batch, COLUMNS)
    with torch.no_grad():
        expected = plain_logprobs(plain_model(models[name]), batch)[0].numpy()
    assert annotated.array("old_logprobs").dtype == np.float32
    np.testing.assert_allclose(annotated.array("old_logprobs"), expected, atol=2e-5, rtol=0, equal_nan=True)
    last = np.isnan(annotated.array("old_logprobs"))
    assert (np.flatnonzero(last) == batch.cu_seqlens[1:] - 1).all()


# Training


@pytest.mark.parametrize("name", ["dense", "moe"])
async def test_three_optimizer_steps_are_those_of_plain_torch(models: dict[str, Path], name: str):
    """Loss, entropy, gradient norm and weights; clipping and weight decay take part, eps is large enough to be well conditioned."""
    import torch

    batch = ragged_batch(steps=3)
    options: dict[str, Any] = dict(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    trainer = build_trainer(models[name], micro_batch_tokens=60, warmup_steps=2, **options)
    report = await trainer.step(batch)

    model = plain_model(models[name])
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-3, foreach=False)
    losses, norms, entropies = [], [], []
    for step, samples in enumerate(batch.steps):
        part = batch.select(samples)
        mask = torch.from_numpy(part.array("loss_mask"))
        logprobs, entropy = plain_logprobs(model, part)
        ratio = (logprobs[mask] - torch.from_numpy(part.array("logprobs"))[mask]).exp()
        advantages = torch.from_numpy(part.array("advantages"))[mask]
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        for group in adamw.param_groups:
            group["lr"] = [5e-3, 1e-2, 1e-2][step]
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
        entropies.append(entropy[mask].mean().item())

    assert report.optimizer_steps == 3
    assert report.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert report.metrics["loss/policy"] == report.metrics["loss"]
    assert report.metrics["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert report.metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert report.metrics["lr"] == 1e-2
    assert report.metrics["tokens"] == batch.segments.tokens
    assert max(norms) > 0.5
    ours = dict(trainer.model.hf.named_parameters())
    for weight, after in model.named_parameters():
        moved = after.detach() - start[weight]
        difference = ours[weight].detach() - after.detach()
        assert float(difference.norm()) <= 1e-3 * float(moved.norm()), weight
        assert float(moved.norm()) > 0, weight


async def test_the_loss_by_numpy(models: dict[str, Path]):
    """PPO-clip from annotated log-probabilities, by the formula; the losses' own metrics are means over trained tokens."""
    batch = await build_trainer(models["dense"]).annotate(ragged_batch(), COLUMNS)
    report = await build_trainer(models["dense"], micro_batch_tokens=40).step(batch)
    mask = batch.array("loss_mask")
    ratio = np.exp(batch.array("old_logprobs")[mask].astype(np.float64) - batch.array("logprobs")[mask])
    advantages = batch.array("advantages")[mask]
    expected = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages).mean()
    assert report.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert report.metrics["ratio"] == pytest.approx(ratio.mean(), rel=1e-5)


async def test_mismatch_is_measured_before_the_first_update_on_fresh_tokens(models: dict[str, Path]):
    """Two optimizer steps over the same samples: after the first the log-probabilities are others."""
    batch = await build_trainer(models["dense"]).annotate(ragged_batch(), COLUMNS)
    every = np.arange(len(batch))
    trainer = build_trainer(models["dense"], lr=0.05, micro_batch_tokens=40)
    trainer.version = 3
    metrics = (await trainer.step(batch.with_steps([every, every]))).metrics

    difference = batch.array("old_logprobs").astype(np.float64) - batch.array("logprobs")
    fresh, older = (difference[batch.array("loss_mask") & (batch.array("versions") == v)] for v in (3, 2))
    weights = np.exp(fresh)
    assert len(fresh) and len(older)
    assert metrics["mismatch/mean_abs"] == pytest.approx(np.abs(fresh).mean(), rel=1e-4)
    assert metrics["mismatch/max_abs"] == pytest.approx(np.abs(fresh).max(), rel=1e-4)
    assert metrics["mismatch/k3"] == pytest.approx((weights - 1 - fresh).mean(), rel=1e-4)
    assert metrics["mismatch/ess"] == pytest.approx(weights.sum() ** 2 / (len(weights) * (weights**2).sum()), rel=1e-4)
    assert metrics["drift/age_1/mean_abs"] == pytest.approx(np.abs(older).mean(), rel=1e-4)


# The gradient does not depend on how a step is cut up


def sequence_ratio(inputs: LossInputs) -> LossOutputs:
    """A loss that is not a function of single tokens: geometric mean ratio of a sequence, and its trajectory's mean entropy."""
    ops = inputs.ops
    ratio = ops.spread(ops.mean(inputs.logprobs - inputs.columns["logprobs"]).exp())
    entropy = ops.mean(inputs.entropy, "trajectory")[ops.trajectory][ops.segment]
    return LossOutputs(-ratio * inputs.columns["advantages"] - 0.1 * entropy)


def trajectory_mean(ops: Any) -> Any:
    """Every trajectory has the same weight."""
    return 1 / (ops.trajectories * ops.trajectory_tokens.clamp(min=1))[ops.segment].double()


@pytest.mark.parametrize("layout, micro_batch_tokens", CUTS)
@pytest.mark.parametrize("name, dtype, tolerance", [("dense", "float64", 1e-10), ("sliding", "float64", 1e-10), ("moe", "float32", 1e-5)])
async def test_gradients_do_not_depend_on_micro_batches_or_layout(
    models: dict[str, Path], tmp_path: Path, name: str, dtype: str, tolerance: float, layout: str, micro_batch_tokens: int
):
    losses = {"policy": toy_ppo, "sequence": sequence_ratio}
    batch = ragged_batch()
    options: dict[str, Any] = dict(losses=losses, aggregation=trajectory_mean)
    whole = await gradient(models[name], tmp_path / "whole", batch, dtype, layout="padded", micro_batch_tokens=10_000, **options)
    cut = await gradient(models[name], tmp_path / "cut", batch, dtype, layout=layout, micro_batch_tokens=micro_batch_tokens, **options)
    assert float(whole.norm()) > 1e-2
    assert float((cut - whole).norm()) <= tolerance * float(whole.norm())


def forked_batch() -> Batch:
    """``ragged_batch`` whose groups begin alike: all samples with the same four tokens, the first two of a group with seven."""
    batch = ragged_batch()
    first: dict[str, Any] = {}
    for i, ref in enumerate(batch.refs):
        sample, one = ref.get(), first.setdefault(ref.id.group, ref.get())
        n = min(len(sample), len(one), 7 if i % 2 else 4)
        sample.tokens[:n] = one.tokens[:n]
    return Batch.of(batch.refs).with_columns({"advantages": batch.array("advantages")})


@pytest.mark.parametrize("layout, micro_batch_tokens", [("packed", 45), ("shared", 1), ("shared", 45), ("shared", 10_000), ("auto", 60)])
@pytest.mark.parametrize("name, dtype, tolerance", [("dense", "float64", 1e-10), ("sliding", "float64", 1e-10), ("moe", "float32", 1e-5)])
async def test_what_samples_begin_with_may_stand_once(
    models: dict[str, Path], tmp_path: Path, name: str, dtype: str, tolerance: float, layout: str, micro_batch_tokens: int
):
    batch, options = forked_batch(), dict(losses={"policy": toy_ppo, "sequence": sequence_ratio})
    alone = await gradient(models[name], tmp_path / "alone", batch, dtype, layout="padded", micro_batch_tokens=1, **options)
    once = await gradient(models[name], tmp_path / "once", batch, dtype, layout=layout, micro_batch_tokens=micro_batch_tokens, **options)
    assert float((once - alone).norm()) <= tolerance * float(alone.norm())


async def test_rows_that_stand_once_go_through_the_model_once(models: dict[str, Path]):
    """As many distinct beginnings as the batch has, counted by hand; and attention pads to a few widths."""
    batch = forked_batch()
    trainer, rows = build_trainer(models["dense"], layout="shared"), []
    trainer.model.hf.get_input_embeddings().register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].numel()))
    await trainer.annotate(batch, COLUMNS)
    assert rows == [len({tuple(ref.get().tokens[: t + 1]) for ref in batch.refs for t in range(ref.length)})]
    assert rows[0] < batch.n_rows


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("name", ["dense", "moe"])
async def test_recomputing_changes_no_gradient(models: dict[str, Path], tmp_path: Path, name: str, layout: str):
    """And layers really run twice in training, once in annotation."""
    batch, options = forked_batch(), dict(layout=layout, micro_batch_tokens=60)
    kept = await gradient(models[name], tmp_path / "kept", batch, "float64", **options)
    again = await gradient(models[name], tmp_path / "again", batch, "float64", recompute=True, **options)
    assert float((again - kept).norm()) <= 1e-12 * float(kept.norm())
    trainer, runs = build_trainer(models[name], recompute=True, micro_batch_tokens=10_000), []
    trainer.model.hf.model.layers[0].mlp.register_forward_pre_hook(lambda *given: runs.append(1))
    await trainer.annotate(batch, COLUMNS)
    assert len(runs) == 1
    await trainer.step(batch)
    assert len(runs) == 3


async def test_old_logprobs_of_an_only_optimizer_step_need_no_annotation(models: dict[str, Path], tmp_path: Path):
    """The gradient is that with annotated ones, and the step reports them."""
    from fixtures.losses import built

    batch, losses = ragged_batch(), {"ppo": built("loss", "ppo_clip")}
    annotated = await build_trainer(models["dense"]).annotate(batch, COLUMNS)
    expected = await gradient(models["dense"], tmp_path / "annotated", annotated, "float64", losses=losses)
    found = await gradient(models["dense"], tmp_path / "not", batch, "float64", losses=losses)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
    trainer = build_trainer(models["dense"], losses=losses)
    trainer.version = 3
    report = await trainer.step(batch)
    known = np.where(batch.array("loss_mask"), annotated.array("old_logprobs"), np.nan)
    np.testing.assert_allclose(report.columns["old_logprobs"], known, atol=2e-5)
    assert {"mismatch/mean_abs", "drift/age_1/mean_abs"} <= report.metrics.keys()
    every = np.arange(len(batch))
    with pytest.raises(KeyError, match="old_logprobs"):  # after the first update they would be other weights'
        await build_trainer(models["dense"], losses=losses).step(batch.with_steps([every, every]))


# Samples without advantage


def without_advantage(batch: Batch, trajectories: list[int]) -> Batch:
    """All advantages of these trajectories are 0."""
    advantages = batch.array("advantages").copy()
    advantages[np.isin(batch.segments.trajectory, trajectories)[batch.segment]] = 0
    return batch.with_columns({"advantages": advantages})


SKIPPING = {"policy": LossTerm(toy_ppo, proportional_to_advantage=True)}


@pytest.mark.parametrize("zero", [[1, 3, 4], list(range(9))], ids=["some", "all"])
async def test_skipping_samples_without_advantage_changes_no_gradient(models: dict[str, Path], tmp_path: Path, zero: list[int]):
    batch, options = without_advantage(ragged_batch(), zero), dict(losses=SKIPPING, aggregation=trajectory_mean)
    full = await gradient(models["dense"], tmp_path / "full", batch, "float64", skip_zero_advantages=False, **options)
    less = await gradient(models["dense"], tmp_path / "less", batch, "float64", **options)
    assert float(full.norm()) > 0 or len(zero) == 9
    assert float((less - full).norm()) <= 1e-12 * float(full.norm())


async def test_an_optimizer_step_without_any_advantage_still_moves_and_decays(models: dict[str, Path]):
    """AdamW's moments of the step before, and weight decay, go on as if everything had been computed."""
    first, second = ragged_batch(), without_advantage(ragged_batch(), list(range(9)))
    trainers = [build_trainer(models["dense"], losses=SKIPPING, lr=1e-2, weight_decay=0.1, skip_zero_advantages=s) for s in (True, False)]
    for trainer in trainers:
        await trainer.step(first)
        before = weights(trainer)
        await trainer.step(second)
        assert not same(before, weights(trainer))
    assert same(weights(trainers[0]), weights(trainers[1]))


async def test_metrics_speak_of_the_samples_that_were_computed(models: dict[str, Path]):
    """Losses of all tokens, means of the others, and the share that was skipped. Mismatch also of fresh tokens that were skipped."""
    batch = without_advantage(ragged_batch(), [1, 3, 4])
    gone = np.isin(batch.segments.trajectory, [1, 3, 4])
    skipped, tokens = batch.segments.sequence_tokens[gone].sum(), batch.segments.tokens
    rest = Batch.of([r for r, g in zip(batch.refs, gone, strict=True) if not g])
    rest = rest.with_columns({"advantages": batch.array("advantages")[~gone[batch.segment]]})

    async def metrics(batch: Batch, **options: Any) -> dict[str, float]:
        trainer = build_trainer(models["dense"], losses=SKIPPING, **options)
        trainer.version = 3
        return (await trainer.step(batch)).metrics

    less, others = await metrics(batch), await metrics(rest)
    full = await metrics(batch, skip_zero_advantages=False)
    assert less["skipped"] == pytest.approx(skipped / tokens) and "skipped" not in full
    assert less["loss"] == pytest.approx(full["loss"], rel=1e-6) and less["tokens"] == tokens
    for name in ("entropy", "ratio", "drift/age_1/mean_abs"):
        assert less[name] == pytest.approx(others[name], rel=1e-5)
    for name in ("mismatch/tokens", "mismatch/mean_abs", "mismatch/ess"):
        assert less[name] == pytest.approx(full[name], rel=1e-5) and less[name] != pytest.approx(others[name], rel=1e-5)


async def test_one_term_that_is_not_proportional_keeps_every_sample(models: dict[str, Path]):
    def nll(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(-inputs.logprobs)

    trainer = build_trainer(models["dense"], losses=SKIPPING | {"nll": LossTerm(nll)})
    assert "skipped" not in (await trainer.step(without_advantage(ragged_batch(), [1]))).metrics


async def test_bfloat16_gradients_accumulate_in_float32(models: dict[str, Path], tmp_path: Path):
    """Against each sample's own bfloat16 backward, summed up in float32. Summed up in bfloat16 they would be 0.7 % off."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    def nll(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(-inputs.logprobs)

    rng = np.random.default_rng(1)
    batch = Batch.of([SampleRef.of(ragged_sample(0, t, rng=rng)) for t in range(32)])
    trainer = build_trainer(models["dense"], losses={"nll": nll}, dtype="bfloat16", micro_batch_tokens=1, max_grad_norm=float("inf"))
    report = await trainer.step(batch)
    await trainer.save(tmp_path)
    ours = {k.split(".", 1)[1]: v / 0.1 for k, v in load_file(tmp_path / "optimizer.safetensors").items() if k.startswith("exp_avg.")}

    model = AutoModelForCausalLM.from_pretrained(models["dense"], dtype=torch.bfloat16).eval()
    wide = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
    narrow = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    batch = batch.load(("targets", "temperatures"))
    for s in range(len(batch)):
        part = batch.select([s])
        mask, targets, temperatures = (torch.from_numpy(part.array(n)) for n in ("loss_mask", "targets", "temperatures"))
        hidden = model.model(torch.from_numpy(part.refs[0].get().tokens)[None]).last_hidden_state[0, mask]
        logits = hidden.float() @ model.lm_head.weight.float().T / temperatures[mask, None]
        logprobs = torch.log_softmax(logits, -1).gather(1, targets[mask, None].long())
        (-logprobs.sum() / batch.segments.tokens).backward()
        for name, parameter in model.named_parameters():
            wide[name] += parameter.grad.float()
            narrow[name] += parameter.grad
        model.zero_grad()

    def distance(other: dict[str, Any]) -> float:
        squares = [((ours[n] - g.float()) ** 2).sum() / (wide[n] ** 2).sum() for n, g in other.items()]
        return float(torch.stack(squares).mean().sqrt())

    norm = torch.stack([g.norm() for g in wide.values()]).norm()
    assert report.metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert distance(wide) < 1e-6
    assert distance(narrow) > 1e-3
