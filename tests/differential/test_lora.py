"""LoRA against PEFT: trainer and engine give the numbers, gradients and files of PEFT's own model."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.lora import lora_engine, lora_trainer, peft_model, write_adapter
from fixtures.training import MODELS, norms_in_full_precision, ragged_batch, same, weights, write_model

from miles_core.adapters import merge, read_tensors
from miles_core.batch import Batch
from miles_core.errors import ConfigError, DataError
from miles_core.lora import Lora
from miles_core.protocols import GenerateRequest, SamplingParams

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "some modules": ("dense", {"target_modules": ["v_proj", "q_proj", "down_proj"]}),
    "of several ranks": ("dense", {"use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"o_proj": 3}}),
    "not in all layers": ("dense", {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]}),
    "moe": ("moe", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "biased": ("biased", {}),
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
}
"""By name: a model, and what its adapter's LoraConfig has."""
MORE = {
    "gpt2": dict(model_type="gpt2", vocab_size=41, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "llama": dict(
        model_type="llama", vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, max_position_embeddings=64, initializer_range=0.2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name) / "base", **config) for name, config in (MODELS | MORE).items()}


@pytest.fixture(scope="module")
def made(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Lora]]:
    """(base, adapter to begin with) by name of ``ADAPTERS``."""
    parent = tmp_path_factory.mktemp("adapters")
    return {
        name: (bases[model], Lora("the base", write_adapter(bases[model], parent / name.replace(" ", "-"), **config)))
        for name, (model, config) in ADAPTERS.items()
    }


def plain_logprobs(model: Any, batch: Batch) -> Any:
    """Log-probability [N] of the predicted tokens at their temperatures, one sample at a time; NaN on last rows."""
    import torch

    logprobs = []
    for ref in batch.refs:
        sample = ref.get()
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        logits = model(tokens[None]).logits[0, :-1] / torch.from_numpy(sample.temperatures()[1:, None])
        logprobs += [torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0], torch.full((1,), torch.nan)]
    return torch.cat(logprobs)


def toy_loss(model: Any, part: Batch) -> Any:
    """``toy_ppo`` by ``token_mean``."""
    import torch

    mask = torch.from_numpy(part.array("loss_mask"))
    ratio = (plain_logprobs(model, part)[mask] - torch.from_numpy(part.array("logprobs"))[mask]).exp()
    advantages = torch.from_numpy(part.array("advantages"))[mask]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


@pytest.mark.parametrize("name", ADAPTERS)
async def test_the_trainer_reads_what_peft_wrote(made: dict[str, tuple[Path, Lora]], name: str):
    import torch

    base, lora = made[name]
    trainer, batch = lora_trainer(base, lora), ragged_batch()
    annotated = await trainer.annotate(batch, frozenset({"old_logprobs"}))
    with torch.no_grad():
        expected = plain_logprobs(peft_model(base, lora.directory), batch).numpy()
        without = plain_logprobs(peft_model(base, lora.directory).unload(), batch).numpy()
    np.testing.assert_allclose(annotated.array("old_logprobs"), expected, atol=2e-5, rtol=0, equal_nan=True)
    assert np.nanmax(np.abs(expected - without)) > 0.1
    await trainer.close()


@pytest.mark.parametrize(
    "name, options",
    [("dense", {}), ("dense", {"recompute": True}), ("of several ranks", {"layout": "padded"}), ("moe", {"layout": "packed"})],
)
async def test_gradients_in_float64_are_those_of_peft(
    made: dict[str, tuple[Path, Lora]], tmp_path: Path, name: str, options: dict[str, Any]
):
    import torch
    from safetensors.torch import load_file

    base, lora = made[name]
    trainer, batch = lora_trainer(base, lora, max_grad_norm=float("inf"), micro_batch_tokens=60, **options), ragged_batch()
    trainer.model.hf.to(torch.float64).set_experts_implementation("eager")
    with norms_in_full_precision(trainer.model.hf):
        await trainer.step(batch)
    await trainer.save(tmp_path / "state")
    moments = {k.removeprefix("exp_avg."): m for k, m in load_file(tmp_path / "state" / "optimizer.safetensors").items() if "exp_avg." in k}

    model = peft_model(base, lora.directory, trained=True).to(torch.float64)
    model.base_model.model.set_experts_implementation("eager")
    with norms_in_full_precision(model):
        toy_loss(model, batch).backward()
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert moments.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(moments[parameter].double() / 0.1, gradient, rtol=1e-5, atol=1e-9)
    await trainer.close()


async def test_three_optimizer_steps_are_those_of_plain_torch_over_peft(made: dict[str, tuple[Path, Lora]]):
    import torch

    base, lora = made["dense"]
    batch = ragged_batch(steps=3)
    trainer = lora_trainer(base, lora, lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.2, micro_batch_tokens=60)
    report = await trainer.step(batch)

    model = peft_model(base, lora.directory, trained=True)
    frozen = {n: p.detach().clone() for n, p in trainer.model.hf.named_parameters() if not p.requires_grad}
    learning = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learning, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1, foreach=False)
    losses, norms = [], []
    for samples in batch.steps:
        loss = toy_loss(model, batch.select(samples))
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learning, 0.2)))
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert max(norms) > 0.2
    assert report.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert report.metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
    start, ours = read_tensors(lora.directory), dict(trainer.named_weights())
    theirs = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() == start.keys()
    for name, after in theirs.items():
        assert float((ours[name] - after).norm()) <= 1e-3 * float((after - start[name]).norm()), name
    base_weights = dict(peft_model(base, lora.directory).unload().named_parameters())
    assert frozen and all(p.equal(base_weights[n.replace(".base_layer", "")]) for n, p in frozen.items())
    await trainer.close()


# The engine


def ask(engine: Any, n: int = 12) -> list[tuple[GenerateRequest, Any]]:
    """Generations of prompts of different length, at a time."""
    rng = np.random.default_rng(5)
    sampling = SamplingParams(max_tokens=9, temperature=0.8)
    asked = [GenerateRequest(f"s{i}", rng.integers(0, 41, 2 + i % 5).astype(np.int32), sampling, i) for i in range(n)]

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(engine.generate(request) for request in asked))

    return list(zip(asked, asyncio.run(all_of_them()), strict=True))


def furthest(model: Any, answers: list[tuple[GenerateRequest, Any]]) -> float:
    """Largest distance of a generation's log-probabilities from the model's own."""
    import torch

    worst = 0.0
    for request, generation in answers:
        tokens = torch.from_numpy(np.concatenate([request.tokens, generation.tokens]).astype(np.int64))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, len(request.tokens) - 1 : -1] / request.sampling.temperature
        expected = torch.log_softmax(logits, -1).gather(1, tokens[len(request.tokens) :, None])[:, 0]
        worst = max(worst, float((expected - torch.from_numpy(generation.logprobs)).abs().max()))
    return worst


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_engine_serves_it_unmerged(made: dict[str, tuple[Path, Lora]], name: str):
    """The adapter it begins with, and one that is given to it later; decoding is fused wherever it is without an adapter."""
    base, lora = made[name]
    engine = lora_engine(base, lora)
    assert engine.stats()["fused"] == (name not in ("moe", "biased", "gpt2"))
    assert furthest(peft_model(base, lora.directory), ask(engine)) < 3e-5
    trainer = lora_trainer(base, lora, lr=3e-2)
    before = weights(trainer)
    asyncio.run(trainer.step(ragged_batch()))
    asyncio.run(engine.update_weights(trainer.named_weights(), 1))
    held = dict(engine.named_weights())
    assert held.keys() == before.keys() and all(held[n].equal(t) and not t.equal(before[n]) for n, t in trainer.named_weights())
    answers = ask(engine)
    assert furthest(trainer.model.hf, answers) < 3e-5 and furthest(peft_model(base, lora.directory), answers) > 0.02
    asyncio.run(engine.close())
    asyncio.run(trainer.close())


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_in_bitwise_mode_a_row_has_the_same_bits_in_any_company(made: dict[str, tuple[Path, Lora]], name: str):
    base, lora = made[name]
    engine = lora_engine(base, lora, bitwise=True)
    many, one = ask(engine), ask(engine, 1)
    np.testing.assert_array_equal(many[0][1].logprobs, one[0][1].logprobs)
    assert furthest(peft_model(base, lora.directory), many) < 3e-5
    asyncio.run(engine.close())


def test_the_engine_checks_itself_with_an_adapter_that_does_something(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """A new one's B is 0, with which a decoding step that forgets it is right."""
    monkeypatch.setattr("miles_rollout.local.fused.Adapters.add_to", lambda self, y, x: None)
    with pytest.raises(ConfigError, match="with its cache in slots Qwen3ForCausalLM gives other logits than by itself"):
        lora_engine(bases["dense"], Lora("x"))


async def test_trainer_and_engine_share_memory(made: dict[str, tuple[Path, Lora]]):
    base, lora = made["dense"]
    trainer, engine = lora_trainer(base, lora, lr=1e-2), lora_engine(base, lora)
    trainer.share_memory(dict(engine.named_weights()))
    await trainer.step(ragged_batch())
    held = dict(engine.named_weights())
    assert all(held[name].data_ptr() == tensor.data_ptr() for name, tensor in trainer.named_weights())
    start = read_tensors(lora.directory)
    assert not any(held[name].equal(start[name]) for name in start)
    await engine.close()
    await trainer.close()


# Files


async def test_a_new_adapter_changes_nothing_and_is_the_same_for_all(bases: dict[str, Path]):
    import torch

    lora = Lora("x", rank=3, alpha=12, seed=4)
    state = torch.random.get_rng_state()
    trainer, engine = lora_trainer(bases["dense"], lora), lora_engine(bases["dense"], lora)
    assert torch.random.get_rng_state().equal(state)
    assert same(weights(trainer), dict(engine.named_weights()))
    assert not same(weights(trainer), weights(lora_trainer(bases["dense"], Lora("x", rank=3, alpha=12, seed=5))))
    for name, tensor in trainer.named_weights():
        assert tensor.any() == (".lora_A." in name) and (tensor.shape[0] if ".lora_A." in name else tensor.shape[1]) == 3
    assert len(weights(trainer)) == 2 * 2 * 7
    await engine.close()
    await trainer.close()


@pytest.mark.parametrize("name", ["dense", "of several ranks", "moe"])
async def test_exports_are_read_by_peft_and_by_us(made: dict[str, tuple[Path, Lora]], tmp_path: Path, name: str):
    import torch
    from transformers import AutoModelForCausalLM

    base, lora = made[name]
    trainer, tokens = lora_trainer(base, lora, lr=1e-2), torch.arange(24).view(2, 12)
    await trainer.step(ragged_batch())
    await trainer.export(tmp_path / "out")
    with torch.no_grad():
        own = trainer.model.hf(tokens).logits
        assert torch.equal(peft_model(base, tmp_path / "out")(tokens).logits, own)
        assert same(weights(trainer), weights(lora_trainer(base, Lora("the base", tmp_path / "out"))))
        said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (
            said["base_model_name_or_path"] == "the base"
            and said["peft_type"] == "LORA"
            and said["lora_dropout"] == 0.0
            and (tmp_path / "out" / "tokenizer.json").is_file()
        )
        merge(tmp_path / "out", base, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
        theirs = peft_model(base, tmp_path / "out").merge_and_unload()
        assert all(torch.equal(p, dict(merged.named_parameters())[n]) for n, p in theirs.named_parameters())
        assert (merged(tokens).logits - own).abs().max() < 1e-4
    await trainer.close()


def test_a_bfloat16_model_is_merged_as_peft_does(made: dict[str, tuple[Path, Lora]], tmp_path: Path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, lora = made["dense"]
    half = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    assert lora.directory is not None
    merge(lora.directory, tmp_path / "half", tmp_path / "merged")
    merged = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").named_parameters())
    for name, parameter in PeftModel.from_pretrained(half, lora.directory).merge_and_unload().named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(merged[name], parameter), name


def test_a_broken_model_is_not_merged(made: dict[str, tuple[Path, Lora]], tmp_path: Path):
    """transformers makes up what is missing."""
    from safetensors.torch import load_file, save_file

    base, lora = made["dense"]
    assert lora.directory is not None
    weights, name = load_file(base / "model.safetensors"), "model.layers.0.self_attn.q_norm.weight"
    broken = {"lacks": {n: t for n, t in weights.items() if n != name}, "nan": weights | {name: weights[name] * float("nan")}}
    for kind, sentence in (("lacks", f"lacks 1 weights of Qwen3ForCausalLM, the first is '{name}'"), ("nan", f"'{name}' are NaN")):
        shutil.copytree(base, tmp_path / kind)
        save_file(broken[kind], tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=sentence):
            merge(lora.directory, tmp_path / kind, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


async def test_the_tokenizer_of_an_adapter_stays_with_it(made: dict[str, tuple[Path, Lora]], tmp_path: Path):
    base, lora = made["dense"]
    own = changed(lora.directory, tmp_path / "own", revision="of the model's hub id, not of a directory")
    (own / "tokenizer_config.json").write_text('{"chat_template": "its own"}')
    trainer = lora_trainer(base, Lora("the base", own))
    await trainer.export(tmp_path / "out")
    merge(own, base, tmp_path / "merged")
    for directory in ("out", "merged"):
        assert json.loads((tmp_path / directory / "tokenizer_config.json").read_text()) == {"chat_template": "its own"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["revision"] is None
    await trainer.close()


async def test_a_cut_goes_on_to_the_bit_and_holds_the_adapter_only(made: dict[str, tuple[Path, Lora]], tmp_path: Path):
    from safetensors.torch import load_file

    base, lora = made["dense"]
    whole, cut = lora_trainer(base, lora, lr=1e-2), lora_trainer(base, lora, lr=1e-2)
    for seed in range(3):
        await whole.step(ragged_batch(seed))
    await cut.step(ragged_batch(0))
    await cut.save(tmp_path / "cut")
    resumed = lora_trainer(base, lora, lr=1e-2)
    await resumed.load(tmp_path / "cut")
    for seed in (1, 2):
        await resumed.step(ragged_batch(seed))
    assert same(weights(whole), weights(resumed))
    assert all(".lora_" in name for file in (tmp_path / "cut").glob("*.safetensors") for name in load_file(file))
    for trainer in (whole, cut, resumed):
        await trainer.close()


async def test_bfloat16_has_masters_with_all_digits_of_the_file(made: dict[str, tuple[Path, Lora]], tmp_path: Path):
    """Steps too small for a bfloat16 add up."""
    import torch
    from safetensors.torch import load_file

    base, lora = made["dense"]
    trainer = lora_trainer(base, lora, dtype="bfloat16", lr=1e-5)
    assert {tensor.dtype for _, tensor in trainer.named_weights()} == {torch.bfloat16}
    await trainer.step(ragged_batch())
    await trainer.save(tmp_path / "cut")
    start, masters = read_tensors(lora.directory), load_file(tmp_path / "cut" / "weights.safetensors")
    for name, tensor in start.items():
        master = masters[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")]
        assert master.dtype == torch.float32 and 0 < float((master - tensor).abs().max()) < 5e-5
    await trainer.close()


def test_a_mixture_has_adapters_of_its_linear_modules(bases: dict[str, Path], tmp_path: Path):
    """By default; PEFT itself would adapt the fused experts too, which is refused."""
    lora = Lora("x", rank=2)
    names = {name.split(".")[-3] for name in weights(lora_trainer(bases["moe"], lora))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert weights(lora_trainer(bases["moe"], lora)).keys() == dict(lora_engine(bases["moe"], lora).named_weights()).keys()
    with pytest.raises(ConfigError, match=r"lora.targets: Qwen3MoeForCausalLM has no linear module 'gate_proj'; it has k_proj, o_proj"):
        lora_trainer(bases["moe"], Lora("x", targets=("q_proj", "gate_proj", "up_proj", "down_proj")))
    asyncio.run(lora_trainer(bases["moe"], lora).export(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"] == {}
    theirs = write_adapter(bases["moe"], tmp_path / "theirs", lora_dropout=0.0)
    with pytest.raises(ConfigError, match=r"target_parameters.*more than plain LoRA"):
        lora_trainer(bases["moe"], Lora("x", theirs))
    older = changed(theirs, tmp_path / "older", target_parameters=None, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ConfigError, match=r"an adapter of 'model.layers.0.mlp.experts.\w+', experts that are fused, is not served"):
        lora_trainer(bases["moe"], Lora("x", older))


# Bad input


def changed(directory: Path, target: Path, **fields: Any) -> Path:
    """A copy whose adapter_config.json says something else."""
    shutil.copytree(directory, target)
    said = json.loads((target / "adapter_config.json").read_text()) | fields
    (target / "adapter_config.json").write_text(json.dumps(said))
    return target


def retensored(directory: Path, target: Path, change: Any) -> Path:
    """A copy whose weights are changed."""
    from safetensors.torch import save_file

    shutil.copytree(directory, target)
    tensors = read_tensors(directory)
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("build", [lora_trainer, lora_engine])
def test_an_adapter_of_another_model_is_refused(bases: dict[str, Path], made: dict[str, tuple[Path, Lora]], tmp_path: Path, build: Any):
    """Another architecture, other sizes, more layers; and the same in all of that with other weights, if the adapter is of Miles."""
    import torch

    dense, lora = made["dense"]
    gpt2 = made["gpt2"][1]
    with pytest.raises(ConfigError, match=r"does not fit Qwen3ForCausalLM, whose linear modules are down_proj, .*not found"):
        build(dense, gpt2)
    wide = write_model(tmp_path / "wide", **MODELS["dense"] | {"intermediate_size": 64})
    with pytest.raises(
        DataError, match=r"belongs to another model than this Qwen3ForCausalLM .*down_proj.lora_A.weight' is \[4, 48\], this"
    ):
        build(wide, lora)
    deep = write_model(tmp_path / "deep", **MODELS["dense"] | {"num_hidden_layers": 3})
    with pytest.raises(DataError, match=r"belongs to another model .*: it lacks 'base_model.model.model.layers.2.*\(6 such\)"):
        build(deep, made["some modules"][1])
    ours = lora_trainer(dense, lora)
    asyncio.run(ours.export(tmp_path / "ours"))
    other = Path(shutil.copytree(dense, tmp_path / "other"))
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 * torch.ones_like(tensor) for name, tensor in weights.items()}, other / "model.safetensors")
    stranger = build(other, lora)  # PEFT's files do not say what they were trained beside
    build(dense, Lora("x", tmp_path / "ours"))
    with pytest.raises(DataError, match="belongs to another model: it was trained beside other weights than those in"):
        build(other, Lora("x", tmp_path / "ours"))
    if build is lora_engine:
        with pytest.raises(DataError, match="belongs to another model: it was trained beside other weights than those in"):
            asyncio.run(stranger.load_weights(tmp_path / "ours", 1))
        assert stranger.version == 0


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"use_dora": True}, "has use_dora: true, which is more than plain LoRA; merge that adapter"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save: \["lm_head"\]'),
        ({"bias": "all"}, 'bias: "all"'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights: "pissa"'),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"peft_type": "IA3"}, "describes an adapter of type 'IA3'; Miles does LORA"),
        ({"r": None}, "does not say its r and target_modules"),
    ],
)
def test_what_is_not_plain_lora_is_refused(made: dict[str, tuple[Path, Lora]], tmp_path: Path, fields: dict[str, Any], sentence: str):
    base, lora = made["dense"]
    with pytest.raises(ConfigError, match=sentence):
        lora_trainer(base, Lora("x", changed(lora.directory, tmp_path / "a", **fields)))


@pytest.mark.parametrize(
    "targets, sentence",
    [
        (("q_proj", "qproj"), "lora.targets: Qwen3ForCausalLM has no linear module 'qproj'; it has down_proj, gate_proj"),
        (("nothing",), r"lora does not fit Qwen3ForCausalLM, whose linear modules are .*v_proj"),
        (("lm_head", "q_proj"), r"an adapter at 'lm_head' \(Linear\) is not served: linear modules of layers get one"),
        (("embed_tokens",), r"an adapter at 'model.embed_tokens' \(Embedding\) is not served"),
    ],
)
def test_targets_that_cannot_be_are_sentences(bases: dict[str, Path], targets: tuple[str, ...], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        lora_engine(bases["dense"], Lora("x", targets=targets))


def test_damaged_files_are_sentences(made: dict[str, tuple[Path, Lora]], tmp_path: Path):
    base, lora = made["dense"]
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(DataError, match=r"holds NaN or infinity in 'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'"):
        lora_trainer(base, Lora("x", retensored(lora.directory, tmp_path / "nan", lambda t: t[name].fill_(float("nan")))))
    short = Path(shutil.copytree(lora.directory, tmp_path / "short"))
    (short / "adapter_model.safetensors").write_bytes((short / "adapter_model.safetensors").read_bytes()[:500])
    with pytest.raises(DataError, match=r"adapter_model.safetensors cannot be read"):
        lora_trainer(base, Lora("x", short))
    (short / "adapter_model.safetensors").rename(short / "adapter_model.bin")
    with pytest.raises(DataError, match=r"a pickled adapter_model.bin is not read: save it as safetensors"):
        lora_trainer(base, Lora("x", short))


async def test_the_engine_loads_an_export(made: dict[str, tuple[Path, Lora]], tmp_path: Path):
    base, lora = made["dense"]
    engine = lora_engine(base, lora)
    before = await engine.checksum()
    with pytest.raises(DataError, match=r"base holds no adapter_model.safetensors, so no adapter that is read here"):
        await engine.load_weights(base, 1)  # a whole model
    await lora_trainer(base, lora).export(tmp_path / "own")
    await engine.load_weights(tmp_path / "own", 1)
    assert await engine.checksum() == before and engine.version == 1
    await engine.close()
