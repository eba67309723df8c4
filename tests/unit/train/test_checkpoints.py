"""What `trainer: torch` writes: its own state, from which it goes on to the bit, and Hugging Face directories."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.training import build_trainer, ragged_batch, weights

from miles_core.errors import CheckpointError


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_it_goes_on_to_the_bit(request: pytest.FixtureRequest, one_thread: None, tmp_path: Path, name: str, dtype: str):
    """Three calls at once, and one call, a fresh trainer, two more; the schedule moves too."""
    path: Path = request.getfixturevalue(name)
    options: dict[str, Any] = dict(dtype=dtype, lr=1e-2, schedule="cosine", warmup_steps=2, total_steps=3, micro_batch_tokens=60)
    batches = [ragged_batch(seed, steps=2) for seed in range(3)]
    straight, first, second = (build_trainer(path, **options) for _ in range(3))
    first.version = straight.version = 3
    expected = [await straight.step(b) for b in batches]

    await first.step(batches[0])
    await first.save(tmp_path)
    await second.load(tmp_path)
    reports = [await second.step(b) for b in batches[1:]]

    assert second.version == 3
    for report, wanted in zip(reports, expected[1:], strict=True):
        timeless = {k: v for k, v in report.metrics.items() if not k.startswith("seconds/")}
        assert timeless == {k: v for k, v in wanted.metrics.items() if not k.startswith("seconds/")}
    ours, theirs = weights(second), weights(straight)
    assert all(ours[n].equal(theirs[n]) for n in theirs)
    before = weights(first)
    assert any(not ours[n].equal(before[n]) for n in theirs)


async def test_a_trainer_can_be_saved_before_its_first_step(dense: Path, tmp_path: Path):
    trainer, fresh = build_trainer(dense, lr=1e-2), build_trainer(dense, lr=1e-2)
    await trainer.save(tmp_path)
    await fresh.load(tmp_path)
    reports = [(await t.step(ragged_batch())).metrics["loss"] for t in (trainer, fresh)]
    assert reports[0] == reports[1]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def other_shape(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)


def without_one(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)


def other_format(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


@pytest.mark.parametrize(
    "file, damage, reason",
    [
        ("weights.safetensors", truncate, r"weights\.safetensors cannot be read"),
        ("optimizer.safetensors", truncate, r"optimizer\.safetensors cannot be read"),
        ("optimizer.safetensors", Path.unlink, r"optimizer\.safetensors cannot be read"),
        ("trainer.json", lambda f: f.write_text('{"format"'), r"trainer\.json cannot be read"),
        ("trainer.json", Path.unlink, r"trainer\.json cannot be read"),
        ("trainer.json", other_format, "not of format 1"),
        ("weights.safetensors", other_shape, r"q_proj\.weight' is torch.float32 \[31, 32\], this model needs float32 \[32, 32\]"),
        ("optimizer.safetensors", other_shape, r"q_proj\.weight' is torch.float32 \[31, 32\]"),
        ("weights.safetensors", without_one, r"lacks 'model\.norm\.weight'"),
    ],
)
async def test_damage_is_a_reason_and_changes_nothing(dense: Path, tmp_path: Path, file: str, damage: Any, reason: str):
    trainer, other = build_trainer(dense, lr=1e-2), build_trainer(dense, lr=1e-2)
    await trainer.step(ragged_batch())
    await trainer.save(tmp_path)
    damage(tmp_path / file)
    before = weights(other)
    with pytest.raises(CheckpointError, match=reason):
        await other.load(tmp_path)
    after = weights(other)
    assert all(after[n].equal(before[n]) for n in before)
    assert other.optimizer_steps == 0


async def test_another_models_checkpoint_is_refused(dense: Path, moe: Path, tmp_path: Path):
    await build_trainer(moe).save(tmp_path)
    with pytest.raises(CheckpointError, match="it belongs to another model"):
        await build_trainer(dense).load(tmp_path)


# Hugging Face directories


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_an_export_reloads_to_the_bit(request: pytest.FixtureRequest, tmp_path: Path, name: str, dtype: str):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    path: Path = request.getfixturevalue(name)
    trainer = build_trainer(path, dtype=dtype, lr=1e-2)
    await trainer.step(ragged_batch())
    await trainer.export(tmp_path)

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == getattr(torch, dtype)
    assert all(p.equal(q) for p, q in zip(model.parameters(), trainer.model.hf.parameters(), strict=True))
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in path.iterdir())
    assert (tmp_path / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    assert load_file(path / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    tokens = torch.from_numpy(np.arange(12))[None]
    with torch.no_grad():
        assert model.eval()(tokens).logits.equal(trainer.model.hf(tokens).logits)


@pytest.mark.parametrize("name", ["dense", "moe"])
async def test_named_weights_are_those_of_the_export(request: pytest.FixtureRequest, tmp_path: Path, name: str):
    """Names of the checkpoint (experts one by one, tied weights once), values that the forward pass uses, no graph."""
    from safetensors.torch import load_file

    trainer = build_trainer(request.getfixturevalue(name), dtype="bfloat16", lr=1e-2)
    await trainer.step(ragged_batch())
    await trainer.export(tmp_path)
    exported, named = load_file(tmp_path / "model.safetensors"), list(trainer.named_weights())
    assert sorted(n for n, _ in named) == sorted(exported)
    assert all(w.equal(exported[n]) and not w.requires_grad for n, w in named)
    assert [n for n, _ in named] == [n for n, _ in trainer.named_weights()]
