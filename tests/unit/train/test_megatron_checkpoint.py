"""What `trainer: megatron` writes: its own state, from which the same layout goes on to the bit, and Hugging Face directories."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.training import ragged_batch, same, weights

from miles_core.errors import CheckpointError, RunError

Start = Callable[..., Any]


CASES = [
    ("dense", {}),
    ("dense", {"tensor": 2}),
    ("dense", {"pipeline": 2}),
    ("dense", {"context": 2}),
    ("dense", {"data": 2}),
    ("moe", {"data": 2, "expert": 2}),
    ("moe", {"tensor": 2, "expert": 2}),
]


@pytest.mark.parametrize("name, layout", CASES)
async def test_it_goes_on_to_the_bit(request: pytest.FixtureRequest, start: Start, tmp_path: Path, name: str, layout: dict[str, int]):
    """Three calls at once, and one call, a fresh trainer, two more. A step count that parameters shared would show in the third.

    In bfloat16, whose masters must come back too; the conformance suite does it in float32.
    """
    path: Path = request.getfixturevalue(name)
    options: dict[str, Any] = dict(parallel=layout, dtype="bfloat16", lr=1e-2, schedule="cosine", warmup_steps=2, total_steps=3)
    batches = [ragged_batch(seed, steps=2) for seed in range(3)]
    straight, first, second = [await start(path, **options) for _ in range(3)]
    first.version = straight.version = 3
    expected = [await straight.step(b) for b in batches]

    await first.step(batches[0])
    await first.save(tmp_path / "cut")
    await second.load(tmp_path / "cut")
    assert (second.version, second.optimizer_steps) == (3, 2)
    reports = [await second.step(b) for b in batches[1:]]

    for report, wanted in zip(reports, expected[1:], strict=True):
        timeless = {k: v for k, v in report.metrics.items() if not k.startswith("seconds/")}
        assert timeless == {k: v for k, v in wanted.metrics.items() if not k.startswith("seconds/")}
    resumed, undisturbed, before = [await asyncio.to_thread(weights, t) for t in (second, straight, first)]
    assert same(resumed, undisturbed)
    assert not same(resumed, before)


async def test_a_trainer_can_be_saved_before_its_first_step(start: Start, dense: Path, tmp_path: Path):
    trainer, fresh = [await start(dense, lr=1e-2, parallel={"data": 2}) for _ in range(2)]
    await trainer.save(tmp_path / "cut")
    await fresh.load(tmp_path / "cut")
    reports = [(await t.step(ragged_batch())).metrics["loss"] for t in (trainer, fresh)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "layout, files",
    [
        ({"data": 2, "expert": 2}, ["stage0-experts0", "stage0-experts1", "stage0-tensor0"]),
        ({"pipeline": 2}, ["stage0-experts0", "stage0-tensor0", "stage1-experts0", "stage1-tensor0"]),
        ({"context": 2}, ["stage0-experts0", "stage0-tensor0"]),
    ],
    ids=str,
)
async def test_every_part_is_written_once(start: Start, moe: Path, tmp_path: Path, layout: dict[str, int], files: list[str]):
    await (await start(moe, parallel=layout)).save(tmp_path / "cut")
    expected = {f"{kind}-{part}.safetensors" for kind in ("optimizer", "weights") for part in files}
    assert {f.name for f in (tmp_path / "cut").iterdir()} == {*expected, "trainer.json"}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def other_shape(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("linear_proj.weight"))
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)


def without_one(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors["decoder.final_layernorm.weight"]
    save_file(tensors, file)


def without_a_moment(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors["exp_avg_sq.decoder.final_layernorm.weight"]
    save_file(tensors, file)


def other_format(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("weights-stage1-tensor0.safetensors", truncate, r"weights-stage1-tensor0\.safetensors cannot be read"),
    ("weights-stage0-tensor0.safetensors", Path.unlink, r"weights-stage0-tensor0\.safetensors cannot be read"),
    ("optimizer-stage1-tensor0.safetensors", truncate, r"optimizer-stage1-tensor0\.safetensors cannot be read"),
    ("trainer.json", Path.unlink, r"trainer\.json cannot be read"),
    ("trainer.json", other_format, "not of format 1"),
    (
        "weights-stage1-tensor0.safetensors",
        other_shape,
        r"linear_proj\.weight' is torch.float32 \[31, 32\], .* \[32, 32\]",
    ),
    ("weights-stage1-tensor0.safetensors", without_one, r"lacks 'decoder\.final_layernorm\.weight'"),
    (
        "optimizer-stage1-tensor0.safetensors",
        without_a_moment,
        r"optimizer-stage1-tensor0\.safetensors lacks 'exp_avg_sq\.decoder\.final_layernorm\.weight'.*incomplete",
    ),
]


async def test_damage_on_one_rank_is_refused_by_all_and_changes_nothing(start: Start, dense: Path, tmp_path: Path):
    trainer, other = [await start(dense, lr=1e-2, parallel={"pipeline": 2}) for _ in range(2)]
    await trainer.step(ragged_batch())
    await trainer.save(tmp_path / "cut")
    before = await asyncio.to_thread(weights, other)
    for number, (file, damage, reason) in enumerate(DAMAGE):
        cut = shutil.copytree(tmp_path / "cut", tmp_path / f"damaged-{number}")
        damage(cut / file)
        with pytest.raises(CheckpointError, match=reason):
            await other.load(cut)
        assert same(await asyncio.to_thread(weights, other), before), reason
        assert other.optimizer_steps == 0
    await other.step(ragged_batch())  # the ranks go on
    await other.load(tmp_path / "cut")
    assert other.optimizer_steps == 1


async def test_another_layout_is_refused_with_both_named(start: Start, dense: Path, tmp_path: Path):
    await (await start(dense, parallel={"tensor": 2})).save(tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"saved with the layout tensor 2, .*; this trainer has tensor 1, .* data 2\. Resume with"):
        await (await start(dense, parallel={"data": 2})).load(tmp_path / "cut")


async def test_another_trainers_checkpoint_is_refused(start: Start, dense: Path, tmp_path: Path):
    from fixtures.training import build_trainer

    await build_trainer(dense).save(tmp_path / "cut")
    with pytest.raises(CheckpointError, match="not of format 1 of the megatron trainer"):
        await (await start(dense)).load(tmp_path / "cut")


async def test_a_disk_that_cannot_be_written_to_is_a_sentence(start: Start, dense: Path, tmp_path: Path):
    trainer = await start(dense, parallel={"data": 2})
    for file in ("weights-stage0-tensor0.safetensors", "trainer.json"):
        cut = tmp_path / file.replace(".", "-")
        (cut / file).mkdir(parents=True)  # stands in the way of rank 0's file
        with pytest.raises(RunError, match=r"^rank 0: .*directory"):
            await trainer.save(cut)
        assert not (cut / "trainer.json").is_file()
    await trainer.step(ragged_batch())  # the ranks go on


# Hugging Face directories


@pytest.mark.parametrize("bucket_bytes, name, layout", [(2**28, "dense", {"pipeline": 2}), (16384, "moe", {"data": 2, "expert": 2})])
async def test_an_export_is_what_transformers_reads(
    request: pytest.FixtureRequest, start: Start, tmp_path: Path, name: str, layout: dict[str, int], bucket_bytes: int
):
    """In one file, or a file for each bucket with an index."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    path: Path = request.getfixturevalue(name)
    trainer = await start(path, parallel=layout, dtype="bfloat16", lr=1e-2, bucket_bytes=bucket_bytes)
    await trainer.step(ragged_batch())
    await trainer.export(tmp_path / "export")
    names = sorted(f.name for f in (tmp_path / "export").iterdir())
    if bucket_bytes == 2**28:
        assert names == sorted(f.name for f in path.iterdir())
    else:
        assert "model.safetensors.index.json" in names and sum(n.endswith(".safetensors") for n in names) > 2
    assert (tmp_path / "export/tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]
    read = revert_weight_conversion(model, dict(model.named_parameters()))
    named = await asyncio.to_thread(weights, trainer)
    assert named.keys() == read.keys()
    assert all(weight.equal(read[n]) for n, weight in named.items())
