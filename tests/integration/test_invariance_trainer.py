"""The same through the torch trainer: padded or packed, in micro-batches of any size, on one rank or three, one gradient for every loss and
aggregation.

All losses of a kind are terms of one step, in float64; what is compared is the gradient of the model's weights, to 1e-10.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.losses import built, config, pack
from fixtures.ranks import run_ranks
from fixtures.training import MODELS, gradient, norms_in_full_precision, ragged_sample, write_model, write_scalar_model

from miles_core.batch import Batch
from miles_core.plugin_finding import find_all
from miles_core.protocols import LossInputs, LossOutputs, LossTerm

pytest.importorskip("torch")

KINDS = {"rows": ("language", ("token", "sequence")), "pairs": ("language", ("pair",)), "values": ("scalar", ("token", "pair"))}
"""Head and units of the losses that one step is made of."""


def of_ours(point: str) -> list[str]:
    """Names of a point's plug-ins; not those that other tests decorated in this process."""
    return sorted(name for name, found in find_all(point).items() if not found.origin.startswith("decorated"))


def terms(kind: str) -> dict[str, LossTerm]:
    """Every registered loss of a kind, each with a coefficient of its own."""
    head, units = KINDS[kind]
    configs = {use: config("loss", use) for use in of_ours("loss")}
    fitting = [use for use, c in configs.items() if c.head == head and c.unit in units]
    return {use: LossTerm(_quiet(built("loss", use)), 1.0 + 0.1 * i, configs[use].unit) for i, use in enumerate(fitting)}


def _quiet(loss: Any) -> Any:
    """Without its metrics, whose names clash with those of other terms."""

    def quiet(inputs: LossInputs) -> LossOutputs:
        return LossOutputs(loss(inputs).loss)

    return quiet


def paired_batch() -> Batch:
    """Five groups of two trajectories, some in two branches, one sample that trains nothing; the columns that losses read."""
    rng = np.random.default_rng(3)
    ids = [(g, t, b) for g in range(5) for t in range(2) for b in range(1 + (g == t))]
    samples = [ragged_sample(*id, rng=rng) for id in ids]
    samples[4].loss_mask[:] = False
    batch = pack(samples)

    def near(x: Any, spread: float = 0.3) -> np.ndarray:
        return (x + spread * rng.normal(size=batch.n_rows)).astype(np.float32)

    side = np.where(np.array([t for _, t, _ in ids])[batch.segment] == 0, 1.0, -1.0)
    columns = {name: near(batch.array("logprobs")) for name in ("old_logprobs", "ref_logprobs", "teacher_logprobs")}
    columns |= {"values": near(0.0), "returns": near(0.0), "advantages": side.astype(np.float32) * near(2.0, 0.1)}
    columns |= {"correction_weights": near(1.0, 0.1), "high_covariance": rng.random(batch.n_rows) < 0.2}
    return batch.with_columns(columns)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By head."""
    language = write_model(tmp_path_factory.mktemp("language"), **MODELS["dense"])
    return {"language": language, "scalar": write_scalar_model(tmp_path_factory.mktemp("scalar"), language)}


def aggregation_of(use: str) -> Any:
    return built("aggregation", use, **({"length": 7} if use == "constant" else {}))


def on_a_rank(rank: int, size: int, paths: dict[str, Path]) -> dict[tuple[str, str, bool], Any]:
    """The gradient of every kind of losses and aggregation, as one vector, with weights gathered once for all passes; for one aggregation
    also with weights gathered layer by layer. There are three ranks, so that no tensor divides evenly."""
    import torch

    from miles_core.plan import unit_of_all, units_of
    from miles_train.ranks.layout import Layout
    from miles_train.ranks.sharding import Cut
    from miles_train.torch_trainer.causal_lm import CausalLM
    from miles_train.torch_trainer.parts import whole
    from miles_train.torch_trainer.passes import Passes
    from miles_train.torch_trainer.scalar_model import ScalarModel
    from miles_train.torch_trainer.sharded import Sharded

    found = {}
    cpu = torch.device("cpu")
    for head, model_class in (("language", CausalLM), ("scalar", ScalarModel)):
        for gathers_once in (True, False):
            model = model_class(paths[head], torch.float32, cpu, "auto")
            model.hf.to(torch.float64)
            with norms_in_full_precision(model.hf):
                sharded = Sharded(model, torch.float64, cpu, gathers_once)
                for kind in (k for k, (of, _) in KINDS.items() if of == head):
                    losses, batch = terms(kind), paired_batch().load(model.reads)
                    cut = Cut.whole(batch, Layout(data=size), units_of(batch, unit_of_all(loss.unit for loss in losses.values())))
                    (micro,) = list(cut.for_ranks(model.reads, tuple(batch.columns)))[rank][0]
                    for aggregation in of_ours("aggregation") if gathers_once else ["token_mean"]:
                        model.hf.zero_grad()
                        Passes(model, losses, aggregation_of(aggregation), 60, sharded).gradients(micro.batch, once=False, real=micro.real)
                        named = sorted(model.hf.named_parameters())
                        found[kind, aggregation, gathers_once] = torch.cat(
                            [whole(p.grad).flatten() for _, p in named if p.grad is not None]
                        ).numpy()
    return found


@pytest.fixture(scope="module")
def over_ranks(models: dict[str, Path]) -> dict[tuple[str, str, bool], Any]:
    """``on_a_rank``, of which all ranks know the whole."""
    return run_ranks(on_a_rank, 3, models)[0]


@pytest.mark.parametrize("aggregation", of_ours("aggregation"))
@pytest.mark.parametrize("kind", KINDS)
async def test_layouts_and_micro_batches(models: dict[str, Path], tmp_path: Path, kind: str, aggregation: str) -> None:
    head, losses, batch = KINDS[kind][0], terms(kind), paired_batch()
    assert len(losses) >= 2
    step: dict[str, Any] = {
        "role": "policy" if head == "language" else "critic",
        "losses": losses,
        "aggregation": aggregation_of(aggregation),
    }
    whole = await gradient(models[head], tmp_path / "whole", batch, "float64", layout="padded", micro_batch_tokens=10_000, **step)
    assert float(whole.norm()) > 1e-2
    for layout, tokens in (("padded", 1), ("packed", 60), ("packed", 10_000), ("shared", 60)):
        part = await gradient(models[head], tmp_path / layout, batch, "float64", layout=layout, micro_batch_tokens=tokens, **step)
        assert float((part - whole).norm()) <= 1e-10 * float(whole.norm()), (layout, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", of_ours("aggregation"))
@pytest.mark.parametrize("kind", KINDS)
async def test_ranks(
    models: dict[str, Path], over_ranks: dict[tuple[str, str, bool], Any], tmp_path: Path, kind: str, aggregation: str
) -> None:
    head = KINDS[kind][0]
    role = "policy" if head == "language" else "critic"
    step: dict[str, Any] = {"role": role, "losses": terms(kind), "aggregation": aggregation_of(aggregation)}
    whole = await gradient(models[head], tmp_path / "whole", paired_batch(), "float64", **step)
    for gathers_once in (True, False) if aggregation == "token_mean" else (True,):
        part = over_ranks[kind, aggregation, gathers_once]
        assert np.linalg.norm(part - whole.numpy()) <= 1e-10 * float(whole.norm()), gathers_once


async def test_what_says_it_is_proportional_to_the_advantage_may_be_skipped(models: dict[str, Path], tmp_path: Path) -> None:
    """All losses that say so at a time: samples without advantage change the gradient by nothing, to 1e-12."""
    found = {use: config("loss", use) for use in of_ours("loss")}
    losses = {use: LossTerm(_quiet(built("loss", use)), 1.0, c.unit, True) for use, c in found.items() if c.proportional_to_advantage}
    assert {"ppo_clip", "gspo", "reinforce"} <= losses.keys() and not {"dro", "kl", "nll", "entropy"} & losses.keys()
    batch = paired_batch()
    advantages = np.where((batch.segments.group % 2 == 0)[batch.segment], batch.array("advantages"), 0).astype(np.float32)
    batch = batch.with_columns({"advantages": advantages})
    step: dict[str, Any] = {"losses": losses, "aggregation": built("aggregation", "token_mean")}
    full = await gradient(models["language"], tmp_path / "full", batch, "float64", skip_zero_advantages=False, **step)
    less = await gradient(models["language"], tmp_path / "less", batch, "float64", **step)
    assert float(full.norm()) > 1e-2
    assert float((less - full).norm()) <= 1e-12 * float(full.norm())
