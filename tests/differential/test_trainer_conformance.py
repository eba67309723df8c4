"""The trainers' conformance suite: `torch` and `megatron` at every layout against plain transformers, dense and mixture of experts.

One table for all: whoever writes a trainer adds a line to ``fixtures.trainers.TRAINERS``. The reference runs one sample at a time
through whole logits, with the losses written out and, for the replay of routing, routers of its own.

The gradient is seen from outside: AdamW with an eps far above every gradient is gradient descent, and lr / eps is its rate.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.trainers import TRAINERS, Plain, fits, make_trainer, routed_batch
from fixtures.training import MODELS, ragged_batch, weights, write_model

from miles_core.batch import Batch
from miles_core.errors import DataError, RunError, StepRefused

RANKS = [name for name in TRAINERS if name.endswith("2")]
"""Those over two ranks. The first test below runs with every one of them and the others where marked; elsewhere the fast suite has what
covers the code that differs, and the rest is slow, as tests/unit/train shows much the same: a step beside the torch trainer, refusals
and resumed runs at every layout."""


def cases(*fast: str) -> list[Any]:
    """Every trainer with every model; those over ranks are slow but for ``fast`` ones, named ``trainer-model``."""
    return [pytest.param(t, m, id=f"{t}-{m}", marks=marks(t, f"{t}-{m}" in fast)) for m in ("dense", "moe") for t in TRAINERS if fits(t, m)]


def marks(trainer: str, fast: bool = False) -> Any:
    return pytest.mark.slow if trainer in RANKS and not fast else ()


SGD: dict[str, Any] = {"lr": 1e9, "eps": 1e7, "max_grad_norm": float("inf")}
RATE = SGD["lr"] / SGD["eps"]
MOE = {"layers": 2, "experts": 4, "k": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name) / "model", **MODELS[name]) for name in ("dense", "moe")}


@pytest.fixture
async def make(models: dict[str, Path], tmp_path: Path, cluster: Any) -> AsyncIterator[Any]:
    """Builds and starts trainers, and closes them."""
    made: list[Any] = []

    async def start(trainer: str, model: str, **options: Any) -> Any:
        made.append(make_trainer(models[model], tmp_path, trainer, cluster, micro_batch_tokens=60, **options))
        await made[-1].start()
        return made[-1]

    yield start
    for trainer in made:
        await trainer.close()


def batch_of(model: str, *, replay: bool, steps: int = 1) -> Batch:
    return routed_batch(**MOE, steps=steps) if replay else ragged_batch(steps=steps)


@pytest.mark.parametrize("trainer, model", cases(*(f"{t}-{m}" for t in RANKS for m in ("dense", "moe"))))
async def test_log_probabilities_gradients_and_one_step(models: dict[str, Path], make: Any, trainer: str, model: str):
    """With the recorded experts replayed where there are any: strict, and with the router's own on the other rows."""
    replay = model == "moe"
    ours = await make(trainer, model, **SGD)
    batch, plain = batch_of(model, replay=replay), Plain.of(models[model], routed=replay)

    annotated = await ours.annotate(batch, frozenset({"old_logprobs"}))
    expected = plain.outputs(batch)[0].detach().numpy()
    np.testing.assert_allclose(annotated.array("old_logprobs"), expected, atol=1e-5, rtol=0, equal_nan=True)

    before = weights(ours)
    report = await ours.step(batch)
    after = weights(ours)
    gradients = plain.gradients(batch)
    assert report.metrics["loss"] == pytest.approx(float(plain.loss(batch).detach()), rel=1e-5)
    assert before.keys() == after.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = float(((before[name] - after[name]) / RATE - gradient).norm() / gradient.norm())
        assert error <= 1e-5, f"gradient of {name} is off by {error:.1e} of its norm"
        # both have gone the same step
        assert float((after[name] - (before[name] - RATE * gradient)).norm()) <= 1e-5 * float((RATE * gradient).norm())


@pytest.mark.parametrize("trainer, model", cases("megatron-pp2-moe", "megatron-tp2-ep2-moe", "megatron-cp2-ep2-moe"))
async def test_three_steps_of_adamw(models: dict[str, Path], make: Any, trainer: str, model: str):
    import torch

    replay = model == "moe"
    ours = await make(trainer, model, lr=1e-2, eps=1e-3, max_grad_norm=0.5)
    plain = Plain.of(models[model], routed=replay)
    adamw = torch.optim.AdamW(plain.model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    batch = batch_of(model, replay=replay)
    for _ in range(3):
        report = await ours.step(batch)
        loss = plain.loss(batch)
        adamw.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5))
        adamw.step()
        assert report.metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
        assert report.metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert norm > 0.5  # clipping took part


@pytest.mark.parametrize("trainer, model", cases("megatron-tp2-dense", "megatron-pp2-dense", *(f"{t}-moe" for t in RANKS)))
async def test_weights_come_out_as_they_went_in(models: dict[str, Path], make: Any, tmp_path: Path, trainer: str, model: str):
    """Hugging Face → trainer → Hugging Face, to the bit: as named tensors and as a directory, which transformers reads whole."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    ours = await make(trainer, model)
    source = load_file(models[model] / "model.safetensors")
    named = weights(ours)
    assert named.keys() == source.keys()
    assert all(named[n].equal(source[n]) and named[n].dtype == source[n].dtype for n in source)
    await ours.export(tmp_path / "export")
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="float32", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(models[model], dtype="float32").state_dict()
    assert all(tensor.equal(original[name]) for name, tensor in read.state_dict().items())
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (models[model] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("trainer, model", cases("torch-ranks2-dense", "megatron-cp2-ep2-moe"))
async def test_resume_is_exact(make: Any, tmp_path: Path, trainer: str, model: str):
    replay = model == "moe"
    ours = await make(trainer, model, lr=1e-2, warmup_steps=2)
    batch = batch_of(model, replay=replay)
    await ours.step(batch)
    (tmp_path / "cut").mkdir()
    await ours.save(tmp_path / "cut")
    expected = await ours.step(batch)
    undisturbed = weights(ours)

    again = await make(trainer, model, lr=1e-2, warmup_steps=2)
    await again.load(tmp_path / "cut")
    report = await again.step(batch)
    resumed = weights(again)
    assert all(resumed[n].equal(w) for n, w in undisturbed.items())
    assert report.metrics["loss"] == expected.metrics["loss"] and report.metrics["lr"] == expected.metrics["lr"]


@pytest.mark.parametrize("trainer", [pytest.param(t, marks=marks(t)) for t in TRAINERS if fits(t, "dense")])
async def test_a_step_that_is_not_finite_is_refused_everywhere(make: Any, trainer: str):
    ours = await make(trainer, "dense")
    batch = ragged_batch()
    advantages = batch.array("advantages").copy()
    row = int(np.flatnonzero(batch.array("loss_mask"))[3])
    advantages[row] = np.nan
    before = weights(ours)
    with pytest.raises(StepRefused, match=r"nan.*" + str(batch.refs[batch.segment[row]].id)):
        await ours.step(batch.with_columns({"advantages": advantages}))
    after = weights(ours)
    assert all(after[n].equal(w) for n, w in before.items())
    await ours.step(batch)  # it goes on


CUT_UP = ("megatron-pp2", "megatron-tp2-ep2", "megatron-cp2-ep2")
"""Layers, rows and experts of a routing column shared out."""
REPLAYING = [pytest.param(t, marks=marks(t, t in CUT_UP)) for t in TRAINERS if t not in ("torch-packed", "megatron")]


@pytest.mark.parametrize("trainer", REPLAYING)
async def test_routing_that_does_not_fit_is_a_sentence(make: Any, trainer: str):
    ours = await make(trainer, "moe")
    before = weights(ours)
    trained = routed_batch(**MOE)
    sample = trained.refs[0].get()
    t = int(np.flatnonzero(sample.loss_mask)[0])
    sample.columns["routing"][t - 1] = 255
    for batch, complaint in [
        (trained, rf"{sample.id}.*"),
        (routed_batch(layers=3, experts=4, k=2), r"3.*2"),
        (routed_batch(layers=2, experts=4, k=1), r"1.*2"),
        (ragged_batch(), r"routing"),
    ]:
        with pytest.raises((DataError, RunError), match=complaint):
            await ours.step(batch)
    after = weights(ours)
    assert all(after[n].equal(w) for n, w in before.items())
    await ours.step(routed_batch(**MOE))  # it goes on


@pytest.mark.parametrize("trainer", REPLAYING)
async def test_how_often_the_routers_would_have_chosen_otherwise(models: dict[str, Path], make: Any, trainer: str):
    """Against routers recorded in plain transformers; and the mismatch with and without replay is told apart."""
    ours = await make(trainer, "moe", compare_routing=True)
    ours.version = 3  # of which most tokens are: a mismatch is measured on fresh ones
    batch = routed_batch(**MOE)
    report = await ours.step(batch)
    plain = Plain.of(models["moe"], routed=True)
    differs, rows, replayed = 0, 0, 0
    for ref in (r for r in batch.refs if r.get().loss_mask.any()):
        own = own_experts(plain, ref.get())
        given = ref.get().columns["routing"]
        recorded = given[:, 0, 0] != 255
        differs += int((np.sort(own, -1) != np.sort(given, -1)).any(-1)[recorded].sum())
        rows, replayed = rows + len(given), replayed + int(recorded.sum())
    assert report.metrics["routing/differs"] == pytest.approx(differs / (replayed * MOE["layers"]), abs=1e-9)
    assert report.metrics["routing/replayed"] == pytest.approx(replayed / rows, abs=1e-9)
    assert report.metrics["mismatch/mean_abs"] != report.metrics["mismatch_own_routing/mean_abs"]


def own_experts(plain: Plain, sample: Any) -> np.ndarray:
    """[T, L, K] that the routers would have chosen, each layer fed by layers that were made to take the recorded ones."""
    import torch
    from fixtures.trainers import forced_routing

    found: list[Any] = []
    routers = [m for m in plain.model.modules() if type(m).__name__ == "Qwen3MoeTopKRouter"]

    def look(router: Any, inputs: Any, output: Any) -> None:
        found.append(output[0].topk(router.top_k, -1).indices.numpy())

    hooks = [router.register_forward_hook(look) for router in routers]
    with torch.no_grad(), forced_routing(plain.model, sample.columns["routing"]):
        plain.model(torch.from_numpy(sample.tokens.astype(np.int64))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return np.stack(found, 1)
