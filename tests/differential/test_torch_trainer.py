"""`trainer: torch` against plain torch: one sample at a time through ``model(...).logits``, log_softmax and torch.optim.AdamW.

The reference shares no code with the trainer: no packing, no padding, no micro-batches, whole logits, sums written out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.training import CUTS, MODELS, build_trainer, gradient, ragged_batch, ragged_sample, toy_ppo, write_model

from miles_core.batch import Batch
from miles_core.protocols import LossInputs, LossOutputs
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
