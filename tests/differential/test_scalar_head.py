"""Critics and reward models of `trainer: torch` against plain transformers: its own sequence-classification models, prefix by prefix.

The reference shares no code with the trainer: no packing, no padding, no micro-batches; a row's value is what transformers says of the
sample cut off after that row's token.
"""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.losses import built
from fixtures.training import (
    CUTS,
    MODELS,
    build_trainer,
    gradient,
    ragged_batch,
    ragged_sample,
    toy_pairs,
    toy_value,
    weights,
    write_model,
    write_scalar_model,
)
from hypothesis import given
from hypothesis import strategies as st

from miles_core.batch import Batch
from miles_core.protocols import LossTerm
from miles_core.refs import SampleRef
from miles_core.sample import Sample, SampleId

VALUES = frozenset({"values"})
LAYOUTS = [("padded", 1), ("padded", 60), ("padded", 10_000), ("packed", 50), ("packed", 10_000)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Language models, and the same with a scalar head as ``<name>-scalar``."""
    paths = {name: write_model(tmp_path_factory.mktemp(name), **config) for name, config in MODELS.items()}
    scalar = {f"{name}-scalar": write_scalar_model(tmp_path_factory.mktemp(f"{name}-scalar"), path) for name, path in paths.items()}
    return paths | scalar


def plain_model(path: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path, dtype="float32").eval()


def plain_values(model: Any, batch: Batch) -> Any:
    """[N], each from a forward pass over the sample's tokens up to and including the row's."""
    import torch

    values = []
    for ref in batch.refs:
        tokens = torch.from_numpy(ref.get().tokens.astype(np.int64))
        values += [model(tokens[None, : p + 1]).logits[0, 0] for p in range(len(tokens))]
    return torch.stack(values)


def with_returns(batch: Batch, seed: int = 0) -> Batch:
    """Returns that are NaN on rows that are not trained."""
    returns = np.random.default_rng(seed).normal(size=batch.n_rows).astype(np.float32)
    return batch.with_columns({"returns": np.where(batch.array("loss_mask"), returns, np.nan).astype(np.float32)})


# Values


@pytest.mark.parametrize("layout, micro_batch_tokens", LAYOUTS)
@pytest.mark.parametrize("name", list(MODELS))
async def test_a_value_is_what_transformers_says_of_the_tokens_so_far(
    models: dict[str, Path], name: str, layout: str, micro_batch_tokens: int
):
    import torch

    batch = ragged_batch()
    path = models[f"{name}-scalar"]
    trainer = build_trainer(path, role="critic", losses={}, layout=layout, micro_batch_tokens=micro_batch_tokens)
    values = (await trainer.annotate(batch, VALUES)).array("values")
    with torch.no_grad():
        expected = plain_values(plain_model(path), batch).numpy()
    assert values.dtype == np.float32
    assert np.abs(expected).std() > 0.1
    np.testing.assert_allclose(values, expected, atol=2e-5, rtol=0)


@given(seed=st.integers(0, 2**32 - 1), cut=st.floats(0, 1), budget=st.sampled_from([1, 20, 70, 10_000]))
def test_a_value_is_a_function_of_the_tokens_so_far(models: dict[str, Path], seed: int, cut: float, budget: int):
    """Whatever follows, however samples are batched: ragged batches, of which every sample is cut off somewhere."""
    rng = np.random.default_rng(seed)
    samples = [ragged_sample(0, t, rng=rng) for t in range(rng.integers(1, 7))]
    lengths = [max(1, int(cut * len(s))) for s in samples]
    whole, begun = (
        Batch.of([SampleRef.of(s) for s in part])
        for part in (samples, [Sample.of(s.id, s.tokens[:n]) for s, n in zip(samples, lengths, strict=True)])
    )
    said = asyncio.run(critic(models["sliding-scalar"], "padded", 10_000).annotate(whole, VALUES)).array("values")
    expected = np.concatenate([said[start : start + n] for start, n in zip(whole.cu_seqlens[:-1], lengths, strict=True)])
    for layout in ("padded", "packed"):
        values = asyncio.run(critic(models["sliding-scalar"], layout, budget).annotate(begun, VALUES)).array("values")
        np.testing.assert_allclose(values, expected, atol=2e-5, rtol=0)


@cache
def critic(path: Path, layout: str, micro_batch_tokens: int) -> Any:
    return build_trainer(path, role="critic", losses={}, layout=layout, micro_batch_tokens=micro_batch_tokens)


async def test_the_head_is_applied_in_float32(models: dict[str, Path]):
    """A bfloat16 model's values are the float32 product of its hidden states and head, not one rounded to 8 bits."""
    import torch
    from transformers import AutoModelForSequenceClassification

    batch, path = ragged_batch(), models["dense-scalar"]
    trainer = build_trainer(path, role="reward", losses={}, dtype="bfloat16", micro_batch_tokens=1)
    values = torch.from_numpy((await trainer.annotate(batch, VALUES)).array("values"))
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        hidden = [model.model(torch.from_numpy(r.get().tokens).long()[None]).last_hidden_state[0] for r in batch.refs]
    expected = torch.cat(hidden).double() @ model.score.weight[0].double()
    torch.testing.assert_close(values.double(), expected, atol=1e-5, rtol=0)
    assert float((values - values.bfloat16().float()).abs().max()) > 1e-3


# Training


@pytest.mark.parametrize("name", ["dense", "moe"])
async def test_three_optimizer_steps_are_those_of_plain_torch(models: dict[str, Path], name: str):
    """Loss, mean value, gradient norm and weights, from the values of trained rows alone."""
    import torch

    path = models[f"{name}-scalar"]
    batch = with_returns(ragged_batch(steps=3))
    options: dict[str, Any] = dict(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    trainer = build_trainer(path, role="critic", losses={"value": toy_value}, micro_batch_tokens=60, **options)
    report = await trainer.step(batch)

    model = plain_model(path)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, foreach=False)
    losses, norms, means = [], [], []
    for samples in batch.steps:
        part = batch.select(samples)
        mask = torch.from_numpy(part.array("loss_mask"))
        values = plain_values(model, part)[mask]
        loss = ((values - torch.from_numpy(part.array("returns"))[mask]) ** 2).mean() / 2
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
        means.append(values.mean().item())

    assert report.metrics["loss"] == report.metrics["loss/value"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert report.metrics["values"] == pytest.approx(np.mean(means), abs=1e-5)
    assert report.metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    assert report.metrics["tokens"] == batch.segments.tokens
    assert not any(name.startswith(("mismatch", "drift", "entropy")) for name in report.metrics)
    assert max(norms) > 0.5
    ours = dict(trainer.model.hf.named_parameters())
    for weight, after in model.named_parameters():
        moved = after.detach() - start[weight]
        assert float((ours[weight].detach() - after.detach()).norm()) <= 1e-3 * float(moved.norm()), weight
        assert float(moved.norm()) > 0, weight


def pairs(n: int, seed: int = 0) -> Batch:
    """Groups of two samples that nobody sampled; ``advantages`` are 1 on the first and −1 on the second."""
    rng = np.random.default_rng(seed)
    samples = [ragged_sample(group, trajectory, rng=rng) for group in range(n) for trajectory in range(2)]
    for sample in samples:
        sample.loss_mask[-1] = True
    batch = with_returns(Batch.of([SampleRef.of(s) for s in samples]), seed)
    return batch.with_columns({"advantages": np.where(batch.segments.trajectory % 2, -1, 1)[batch.segment].astype(np.float32)})


async def test_a_pair_loss_reaches_the_values_of_last_rows(models: dict[str, Path], tmp_path: Path):
    """Bradley–Terry through the trainer has the gradient of −log σ(s₀ − s₁) with plain transformers' scores, in float64."""
    import torch

    batch = pairs(3)
    term = LossTerm(built("loss", "bradley_terry"), unit="pair")
    aggregation = built("aggregation", "sequence_mean")
    options: dict[str, Any] = dict(role="reward", losses={"pairs": term}, aggregation=aggregation, micro_batch_tokens=1)
    ours = await gradient(models["biased-scalar"], tmp_path, batch, "float64", **options)

    model = plain_model(models["biased-scalar"]).double()
    scores = [model(torch.from_numpy(r.get().tokens).long()[None]).logits[0, 0] for r in batch.refs]
    loss = -torch.stack([torch.nn.functional.logsigmoid(scores[2 * g] - scores[2 * g + 1]) for g in range(3)]).mean()
    loss.backward()
    parameters = dict(model.named_parameters())
    expected = torch.cat([parameters[n].grad.flatten() for n in sorted(parameters)])
    assert float(expected.norm()) > 1e-2
    assert float((ours - expected).norm()) <= 1e-10 * float(expected.norm())


@pytest.mark.parametrize("layout, micro_batch_tokens", CUTS)
@pytest.mark.parametrize("name, dtype, tolerance", [("dense", "float64", 1e-10), ("sliding", "float64", 1e-10), ("moe", "float32", 1e-5)])
async def test_gradients_do_not_depend_on_micro_batches_or_layout(
    models: dict[str, Path], tmp_path: Path, name: str, dtype: str, tolerance: float, layout: str, micro_batch_tokens: int
):
    """A loss of single rows and one of pairs, which stay together because the loss says so."""
    batch, path = pairs(5), models[f"{name}-scalar"]
    options: dict[str, Any] = dict(role="critic", losses={"value": toy_value, "pairs": LossTerm(toy_pairs, 0.3, "pair")})
    whole = await gradient(path, tmp_path / "whole", batch, dtype, layout="padded", micro_batch_tokens=10_000, **options)
    cut = await gradient(path, tmp_path / "cut", batch, dtype, layout=layout, micro_batch_tokens=micro_batch_tokens, **options)
    assert float(whole.norm()) > 1e-2
    assert float((cut - whole).norm()) <= tolerance * float(whole.norm())


# From a language model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dense", "moe", "biased"])
async def test_a_language_model_becomes_a_critic_whose_values_start_at_0(models: dict[str, Path], name: str, dtype: str):
    """The head learns in the first step and carries the gradient to all other weights in the second."""
    batch = with_returns(ragged_batch())
    trainer = build_trainer(models[name], role="critic", losses={"value": toy_value}, dtype=dtype, lr=1e-2, weight_decay=0.0)
    assert not (await trainer.annotate(batch, VALUES)).array("values").any()
    start = weights(trainer)
    report = await trainer.step(batch)
    first = weights(trainer)
    assert report.metrics["values"] == 0
    assert report.metrics["grad_norm"] > 0
    assert [n for n in first if not first[n].equal(start[n])] == ["score.weight"]
    assert bool(first["score.weight"].ne(0).all())
    await trainer.step(batch)
    second = weights(trainer)
    assert [n for n in second if second[n].equal(first[n])] == []
    assert (await trainer.annotate(batch, VALUES)).array("values").any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dense", "moe"])
async def test_an_export_is_a_sequence_classification_model(models: dict[str, Path], tmp_path: Path, name: str, dtype: str):
    """transformers loads it whole; a critic that starts from it says the same; ``named_weights`` are its tensors."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    batch = with_returns(ragged_batch())
    trainer = build_trainer(models[name], role="critic", losses={"value": toy_value}, dtype=dtype, lr=1e-2)
    for _ in range(2):
        await trainer.step(batch)
    await trainer.export(tmp_path)

    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.num_labels == 1 and model.dtype == getattr(torch, dtype)
    assert all(p.equal(q) for p, q in zip(model.parameters(), trainer.model.hf.parameters(), strict=True))
    assert (tmp_path / "tokenizer.json").read_bytes() == (models[name] / "tokenizer.json").read_bytes()
    exported, named = load_file(tmp_path / "model.safetensors"), dict(trainer.named_weights())
    assert sorted(named) == sorted(exported)
    assert all(w.equal(exported[n]) and not w.requires_grad for n, w in named.items())

    values = [(await t.annotate(batch, VALUES)).array("values") for t in (trainer, build_trainer(tmp_path, role="reward", dtype=dtype))]
    assert values[0].any()
    np.testing.assert_array_equal(values[0], values[1])


# A reward model learns


RULE = 7
"""The better answer is the one that says this token more often."""


def rule_pairs(n: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    samples, preferred = [], []
    for group in range(n):
        answers = [rng.integers(0, 20, rng.integers(4, 11)) for _ in range(2)]
        for place in rng.choice(4, size=rng.integers(1, 4), replace=False):
            answers[rng.integers(2)][place] = RULE
        said = [int((a == RULE).sum()) for a in answers]
        if said[0] == said[1]:
            answers[0] = np.append(answers[0], RULE)
            said[0] += 1
        for trajectory, answer in enumerate(answers):
            tokens = [1, 2, *answer.tolist()]
            mask = [False, False] + [True] * len(answer)
            samples.append(Sample.of(SampleId("test", "judge", f"p{group}", f"g{group}", trajectory), tokens, loss_mask=mask))
            preferred.append(1.0 if said[trajectory] == max(said) else -1.0)
    batch = Batch.of([SampleRef.of(s) for s in samples])
    return batch.with_columns({"advantages": np.array(preferred, np.float32)[batch.segment]})


async def accuracy(trainer: Any, batch: Batch) -> float:
    values = (await trainer.annotate(batch, VALUES)).array("values")
    scores = values[batch.cu_seqlens[1:] - 1].reshape(-1, 2)
    preferred = batch.array("advantages")[batch.cu_seqlens[1:] - 1].reshape(-1, 2)
    return float(((scores[:, 0] - scores[:, 1]) * preferred[:, 0] > 0).mean())


async def test_a_reward_model_learns_a_rule(models: dict[str, Path]):
    """From a language model, by Bradley–Terry on 32 pairs a step; judged on pairs that it never saw."""
    term = LossTerm(built("loss", "bradley_terry"), unit="pair")
    trainer = build_trainer(
        models["dense"], role="reward", losses={"pairs": term}, aggregation=built("aggregation", "sequence_mean"), lr=3e-3, warmup_steps=5
    )
    held_out = rule_pairs(200, seed=999)
    assert await accuracy(trainer, held_out) == 0  # all values are 0: no pair is told apart
    reports = [await trainer.step(rule_pairs(32, seed)) for seed in range(40)]
    assert reports[0].metrics["loss"] == pytest.approx(np.log(2))
    assert reports[0].metrics["accuracy"] == pytest.approx(0.5)
    assert reports[-1].metrics["loss"] < 0.4
    assert await accuracy(trainer, held_out) > 0.9
