"""The same through the torch trainer: padded or packed, in micro-batches of any size, every loss and aggregation gives one gradient.

All losses of a head are terms of one step, in float64; what is compared is the gradient of the model's weights, to 1e-10.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.training import MODELS, ragged_sample, write_model

from miles_core.batch import Batch
from miles_core.plugins import config_class, find_all
from miles_core.protocols import BuildContext, LossInputs, LossOutputs, LossTerm
from miles_core.refs import SampleRef

torch = pytest.importorskip("torch")


def built(point: str, use: str) -> tuple[Any, Any]:
    """Options and the function of a plug-in."""
    options = {"constant": {"length": 7}}.get(use, {}) if point == "aggregation" else {}
    config = config_class(point, use).model_validate({"use": use, **options})
    return config, config.build(BuildContext(None, "invariance", 0))


def of_ours(point: str) -> list[str]:
    """Names of a point's plug-ins; not those that other tests decorated in this process."""
    return sorted(name for name, found in find_all(point).items() if not found.origin.startswith("decorated"))


def terms(units: tuple[str, ...]) -> dict[str, LossTerm]:
    """Every registered loss of a language model of these units, each with a coefficient of its own; without metrics, whose names clash."""
    found = {}
    for i, use in enumerate(of_ours("loss")):
        config, loss = built("loss", use)
        if config.head == "language" and config.unit in units:
            found[use] = LossTerm(lambda inputs, loss=loss: _quiet(loss, inputs), 1.0 + 0.1 * i, config.unit)
    return found


def _quiet(loss: Any, inputs: LossInputs) -> LossOutputs:
    return LossOutputs(loss(inputs).loss)


def paired_batch() -> Batch:
    """Five groups of two trajectories, some in two branches, one sample that trains nothing; the columns that losses read."""
    rng = np.random.default_rng(3)
    ids = [(g, t, b) for g in range(5) for t in range(2) for b in range(1 + (g == t))]
    samples = [ragged_sample(*id, rng=rng) for id in ids]
    samples[4].loss_mask[:] = False
    batch = Batch.of([SampleRef.of(s) for s in samples])

    def near(x: np.ndarray, spread: float = 0.3) -> np.ndarray:
        return (x + spread * rng.normal(size=batch.n_rows)).astype(np.float32)

    logprobs = batch.array("logprobs")
    side = np.where(np.array([t for _, t, _ in ids])[batch.segment] == 0, 1.0, -1.0)
    columns = {name: near(logprobs) for name in ("old_logprobs", "ref_logprobs", "teacher_logprobs")}
    columns |= {"advantages": side.astype(np.float32) * near(np.full(batch.n_rows, 2.0), 0.1)}
    columns |= {"correction_weights": near(np.ones(batch.n_rows), 0.1), "high_covariance": rng.random(batch.n_rows) < 0.2}
    return batch.with_columns(columns)


@contextmanager
def norms_in_full_precision(model: Any) -> Iterator[None]:
    """transformers computes RMSNorm in float32 whatever the model's dtype, which would hide what float64 is to show."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense"), **MODELS["dense"])


async def gradient(path: Path, directory: Path, losses: dict[str, LossTerm], aggregation: str, **options: Any) -> tuple[Any, dict]:
    """The gradient of one optimizer step as one vector, from AdamW's first moment, (1 − β₁) · gradient; and the metrics."""
    from safetensors.torch import load_file

    config = config_class("trainer", "torch").model_validate({"use": "torch", "max_grad_norm": float("inf"), **options})
    context = BuildContext(
        directory, "invariance", 0, "policy", path, losses=losses, aggregation=built("aggregation", aggregation)[1], total_steps=1
    )
    trainer = config.build(context)
    trainer.model.hf.to(torch.float64)
    with norms_in_full_precision(trainer.model.hf):
        report = await trainer.step(paired_batch())
    await trainer.save(directory)
    await trainer.close()
    moments = load_file(directory / "optimizer.safetensors")
    return torch.cat([moments[k].flatten() for k in sorted(moments) if k.startswith("exp_avg.")]) / 0.1, report.metrics


@pytest.mark.parametrize("aggregation", of_ours("aggregation"))
@pytest.mark.parametrize("units", [("token", "sequence"), ("pair", "group")], ids=["rows", "pairs"])
async def test_layouts_and_micro_batches(model: Path, tmp_path: Path, units: tuple[str, ...], aggregation: str) -> None:
    losses = terms(units)
    assert len(losses) >= 2
    whole, metrics = await gradient(model, tmp_path / "whole", losses, aggregation, layout="padded", micro_batch_tokens=10_000)
    assert float(whole.norm()) > 1e-2
    for layout, tokens in (("padded", 1), ("packed", 60), ("packed", 10_000)):
        cut, found = await gradient(model, tmp_path / f"{layout}{tokens}", losses, aggregation, layout=layout, micro_batch_tokens=tokens)
        assert float((cut - whole).norm()) <= 1e-10 * float(whole.norm()), (layout, tokens)
        for name in ("loss", "entropy", *(f"loss/{term}" for term in losses)):
            assert found[name] == pytest.approx(metrics[name], rel=1e-10, abs=1e-12), (layout, tokens, name)
