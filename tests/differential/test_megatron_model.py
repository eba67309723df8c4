"""megatron-core's model on two and four gloo ranks against transformers, one sample at a time.

The reference shares no code with it: no packing, no table of weights, no parallel axis, whole logits. Gradients are those of
Σ c · logprob + Σ d · entropy with random c and d, compared tensor by tensor under the checkpoint's own names.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.ranks import run_ranks
from fixtures.training import COMMON, MODELS, VOCAB, ragged_batch, write_model

from miles_core.batch import Batch
from miles_train.ranks.layout import Layout

MOE: dict[str, Any] = dict(MODELS["moe"], num_experts=8)
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": dict(model_type="qwen3", tie_word_embeddings=False, **COMMON),
    "tied": MODELS["dense"],
    "moe": MOE,
    "moe_not_normalised": MOE | dict(norm_topk_prob=False),
    "moe_mixed": MOE | dict(mlp_only_layers=[0]),
}
LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "PP2": Layout(pipeline=2),
    "CP2": Layout(context=2),
    "DP2": Layout(data=2),
    "TP2 CP2": Layout(tensor=2, context=2),
    "TP2 PP2": Layout(tensor=2, pipeline=2),
}
MOE_LAYOUTS = LAYOUTS | {
    "EP2": Layout(expert=2, data=2),
    "EP2 TP2": Layout(expert=2, tensor=2),
    "EP2 CP2": Layout(expert=2, context=2),
    "EP2 PP2 TP2": Layout(expert=2, pipeline=2, tensor=2),
    "EP2 DP2 TP2": Layout(expert=2, data=2, tensor=2),
}
CASES = [
    *(("dense", name) for name in LAYOUTS),
    *(("tied", name) for name in ("TP1", "TP2", "PP2", "TP2 PP2")),
    *(("moe", name) for name in MOE_LAYOUTS),
    *(("moe_not_normalised", name) for name in ("TP1", "EP2")),
    *(("moe_mixed", name) for name in ("TP1", "PP2", "EP2 PP2 TP2")),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name), **config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Of each model, computed when it is asked for."""

    class References(dict[str, dict[str, Any]]):
        def __missing__(self, name: str) -> dict[str, Any]:
            self[name] = reference(models[name])
            return self[name]

    return References()


def batch() -> Batch:
    """12 ragged samples; ``advantages`` and ``returns`` hold the random c and d of rows that predict a token, 0 on last rows."""
    rows = ragged_batch().load(("tokens", "targets", "positions", "temperatures"))
    random = np.random.default_rng(1).standard_normal((2, rows.n_rows)).astype(np.float32) * ~rows.ends
    return rows.with_columns({"advantages": random[0], "returns": random[1]})


def micro_batches(rows: Batch) -> list[np.ndarray]:
    """Sample indices of four of different sizes; one is a single sample."""
    return np.split(np.arange(len(rows)), [5, 6, 9])


def reference(path: Path) -> dict[str, Any]:
    """logprobs and entropies [N], NaN on last rows; hidden [N, H]; gradients by name in the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    model.set_experts_implementation("eager")
    rows = batch()
    logprobs, entropies, hidden = [], [], []
    for ref in rows.refs:
        sample = ref.get()
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        temperatures = torch.from_numpy(sample.temperatures()[1:, None])
        output = model(tokens[None], output_hidden_states=True)
        logp = torch.log_softmax(output.logits[0, :-1] / temperatures, -1)
        zero = torch.zeros(1)
        logprobs += [logp.gather(1, tokens[1:, None])[:, 0], zero]
        entropies += [-(logp.exp() * logp).sum(-1), zero]
        hidden.append(output.hidden_states[-1][0])
    logprob, entropy = torch.cat(logprobs), torch.cat(entropies)
    c, d = (torch.from_numpy(rows.array(n)) for n in ("advantages", "returns"))
    (c * logprob + d * entropy).sum().backward()
    gradients: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
    gradients = revert_weight_conversion(model, gradients)
    return {
        "logprobs": logprob.detach().numpy(),
        "entropy": entropy.detach().numpy(),
        "hidden": torch.cat(hidden).detach().numpy(),
        "gradients": {n: g.numpy() for n, g in gradients.items()},
    }


def on_ranks(rank: int, size: int, path: str, sizes: dict[str, int], recompute: bool = False, dtype: str = "float32") -> dict[str, Any]:
    """One forward and backward pass over all micro-batches through megatron's own schedules, gradients reduced as it does."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from miles_train.megatron import inputs, specs, weights
    from miles_train.megatron.model import build, initialize

    layout = Layout(**sizes)
    initialize(layout, timeout_s=60)
    here = layout.coordinates(rank)
    model = build(Path(path), specs.model_spec(specs.read_config(Path(path))), layout, getattr(torch, dtype), recompute=recompute)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.config.finalize_model_grads_func = lambda models, tokens, **kwargs: finalize_model_grads(models)
    rows = batch()
    mine = micro_batches(rows)[here.data :: layout.data]
    results: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    def step(iterator: Any, module: Any) -> Any:
        samples = next(iterator)
        micro = inputs.micro_inputs(rows.select(samples), layout, here.context)
        hidden = module(micro.tokens, micro.positions, micro.mask)

        def loss(hidden: Any) -> Any:
            part = micro.batch
            output = inputs.outputs(model, hidden, micro, np.flatnonzero(~part.ends))
            index = rows.rows_of(samples)
            if layout.context > 1:
                index = index[rows.select(samples).context_rows(here.context, layout.context)]
            values = {n: x.detach().numpy() for n, x in output.items()} | {"hidden": hidden[: part.n_rows].detach().float().numpy()}
            results.append((index, values))
            c, d = (torch.from_numpy(part.array(n)) for n in ("advantages", "returns"))
            return (c * output["logprobs"] + d * output["entropy"]).sum(), torch.tensor(0, dtype=torch.int), {}

        return hidden, loss

    wrapped.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step, data_iterator=iter(mine), model=[wrapped], num_microbatches=len(mine), seq_length=1, micro_batch_size=1,
    )  # fmt: skip
    gradients = {n: g.numpy() for bucket in weights.export(model, 4096, of=lambda p: p.main_grad) for n, g in bucket}  # ty: ignore[missing-attribute]
    out = {n: w.float().numpy() for bucket in weights.export(model, 4096) for n, w in bucket}
    listed = [(e.name, e.shape) for e in weights.manifest(model)]
    return {"results": results, "gradients": gradients, "weights": out, "manifest": listed}


@pytest.mark.parametrize("name, layout", CASES)
def test_equal_to_transformers(models: dict[str, Path], references: dict[str, dict[str, Any]], name: str, layout: str):
    """Every row of every rank, every gradient, and the weights after a round trip."""
    sizes = MOE_LAYOUTS[layout]
    ranks = run_ranks(on_ranks, sizes.world_size, str(models[name]), asdict(sizes))
    check(ranks, references[name], models[name])


def test_recompute_changes_nothing(models: dict[str, Path], references: dict[str, dict[str, Any]]):
    sizes = Layout(expert=2, tensor=2)
    ranks = run_ranks(on_ranks, 2, str(models["moe"]), asdict(sizes), True)
    check(ranks, references["moe"], models["moe"])


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2)])
def test_bfloat16_is_near(models: dict[str, Path], references: dict[str, dict[str, Any]], layout: Layout):
    """Within a few of bfloat16's roundings (2⁻⁹) of numbers up to 7, and gradients, added up in float32, within some percent."""
    ranks = run_ranks(on_ranks, layout.world_size, str(models["dense"]), asdict(layout), False, "bfloat16")
    expected = references["dense"]
    for index, values in ranks[-1]["results"]:
        assert values["logprobs"].dtype == np.float32
        np.testing.assert_allclose(values["logprobs"], expected["logprobs"][index], atol=0.2)
        assert np.abs(values["logprobs"] - expected["logprobs"][index]).mean() < 0.03
    ours, theirs = (np.concatenate([g[n].ravel() for n in expected["gradients"]]) for g in (ranks[0]["gradients"], expected["gradients"]))
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def check(ranks: list[dict[str, Any]], expected: dict[str, Any], path: Path) -> None:
    from safetensors.numpy import load_file

    seen = np.zeros(len(expected["logprobs"]), int)
    for rank in ranks:
        for index, values in rank["results"]:
            seen[index] += 1
            for column, value in values.items():
                np.testing.assert_allclose(value, expected[column][index], atol=1e-5, rtol=1e-5, err_msg=column)
    assert (seen > 0).all()
    differences = {n: np.linalg.norm(ranks[0]["gradients"][n] - g) / np.linalg.norm(g) for n, g in expected["gradients"].items()}
    assert {n: d for n, d in differences.items() if not d <= 1e-5} == {}
    on_disk = load_file(path / "model.safetensors")
    assert ranks[0]["weights"].keys() == on_disk.keys() == ranks[0]["gradients"].keys() == expected["gradients"].keys()
    for weight, value in on_disk.items():
        assert (ranks[0]["weights"][weight].view(np.int32) == value.view(np.int32)).all(), weight
    assert all(rank["manifest"] == [(n, w.shape) for n, w in ranks[0]["weights"].items()] for rank in ranks)
    assert all(rank["weights"] == {} for rank in ranks[1:])


def test_vocabulary_that_does_not_divide():
    assert VOCAB % 2 == 1  # so that every layout with TP2 above pads it


# Micro-batches


@pytest.mark.parametrize("sizes", [Layout(), Layout(tensor=4), Layout(context=2), Layout(context=3, tensor=2)])
def test_inputs(sizes: Layout):
    """Every row is on one context-parallel rank, and sees exactly the rows of its sample up to itself."""
    from miles_train.megatron.inputs import micro_inputs

    rows = batch().select(np.array([2, 7, 8]))
    parts = [micro_inputs(rows, sizes, rank) for rank in range(sizes.context)]
    r = parts[0].tokens.shape[1]
    assert all(p.tokens.shape == p.positions.shape == (1, r) for p in parts)
    assert r % sizes.tensor == 0
    assert r - max(p.batch.n_rows for p in parts) < sizes.tensor
    where = np.concatenate(
        [rows.context_rows(rank, sizes.context) if sizes.context > 1 else np.arange(rows.n_rows) for rank in range(len(parts))]
    )
    assert sorted(where) == list(range(rows.n_rows))
    real = np.concatenate([np.arange(p.batch.n_rows) + rank * r for rank, p in enumerate(parts)])
    tokens, positions = (np.concatenate([getattr(p, n).numpy()[0] for p in parts]) for n in ("tokens", "positions"))
    assert (tokens[real] == rows.array("tokens")[where]).all()
    assert (positions[real] == rows.array("positions")[where]).all()
    padding = np.setdiff1d(np.arange(len(tokens)), real)
    assert (tokens[padding] == 0).all()
    if sizes.context == 1:
        lengths = parts[0].mask.tolist()
        assert lengths == [*rows.lengths.tolist(), *([r - rows.n_rows] if r > rows.n_rows else [])]
        return
    seen = np.concatenate([p.mask.numpy()[0, 0] for p in parts])
    expected = (rows.segment[where][:, None] == rows.segment[where]) & (where[:, None] >= where)
    assert (seen[np.ix_(real, real)] == expected).all()
    assert not seen[np.ix_(real, padding)].any()
    assert (seen[padding].sum(1) == 1).all()
    assert seen[padding, padding].all()


def lone_token(rank: int, size: int, path: str) -> tuple[int, list[float], bool]:
    """A micro-batch of one sample of one token: one context-parallel rank has no row of it. Rows here, outputs, finite gradients."""
    import torch

    from miles_core.refs import SampleRef
    from miles_core.sample import Sample
    from miles_train.megatron import inputs, specs
    from miles_train.megatron.model import build, initialize
    from miles_train.ranks.messages import READS

    layout = Layout(context=2)
    initialize(layout, timeout_s=60)
    model = build(Path(path), specs.model_spec(specs.read_config(Path(path))), layout, torch.float32)
    whole = batch()
    one = Batch.of([SampleRef.of(Sample.of(whole.refs[0].id, np.array([3])))]).load(READS)
    micro = inputs.micro_inputs(one, layout, layout.coordinates(rank).context)
    output = inputs.outputs(model, inputs.forward(model, micro), micro, np.zeros(0, np.int64))
    (output["logprobs"].sum() + output["entropy"].sum()).backward()
    finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    return micro.batch.n_rows, output["logprobs"].tolist(), finite


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_rank_without_rows(models: dict[str, Path], name: str):
    ranks = run_ranks(lone_token, 2, str(models[name]))
    assert sorted(n for n, _, _ in ranks) == [0, 1]
    assert all(logprobs == [0.0] * n and finite for n, logprobs, finite in ranks)


# Weights in and out


def in_and_out(rank: int, size: int, path: str, sizes: dict[str, int], max_bytes: int) -> tuple[list[list[str]], list[int], dict[str, Any]]:
    """Names and bytes of each bucket, and all weights as integers, of a model in bfloat16."""
    import torch

    from miles_train.megatron import specs, weights
    from miles_train.megatron.model import build, initialize

    initialize(Layout(**sizes), timeout_s=60)
    model = build(Path(path), specs.model_spec(specs.read_config(Path(path))), Layout(**sizes), torch.bfloat16)
    buckets = list(weights.export(model, max_bytes))
    sent = {n: w.view(torch.int16).numpy() for bucket in buckets for n, w in bucket}
    return [[n for n, _ in bucket] for bucket in buckets], [sum(w.nbytes for _, w in bucket) for bucket in buckets], sent


@pytest.mark.parametrize("sizes", [Layout(), Layout(tensor=2, pipeline=2, expert=2)])
@pytest.mark.parametrize("max_bytes", [1, 5000, 10**9])
def test_buckets_of_a_sharded_bfloat16_checkpoint(tmp_path: Path, sizes: Layout, max_bytes: int):
    """The same bits in the order of the table, each bucket within its bytes unless one group alone is larger."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    source = write_model(tmp_path / "float32", **CONFIGS["moe_mixed"])
    AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    on_disk = {n: w.view(torch.int16).numpy() for file in files for n, w in load_file(file).items()}
    ranks = run_ranks(in_and_out, sizes.world_size, str(tmp_path / "model"), asdict(sizes), max_bytes)
    names, nbytes, sent = ranks[0]
    assert sent.keys() == on_disk.keys()
    assert all((sent[n] == on_disk[n]).all() for n in on_disk)
    assert all(
        n <= max_bytes or len({name.split("_proj")[0].rpartition(".")[0] for name in bucket}) == 1
        for n, bucket in zip(nbytes, names, strict=True)
    )
    assert (len(names) == 1) == (max_bytes == 10**9)
    flat = [name for bucket in names for name in bucket]
    assert (flat[0], flat[-1]) == ("model.embed_tokens.weight", "lm_head.weight")
    assert [[[]] * len(names)] * (sizes.world_size - 1) == [rank[0] for rank in ranks[1:]]


def load_one(rank: int, size: int, path: str) -> str:
    """The sentence with which a model is refused, or nothing."""
    import torch

    from miles_core.errors import ConfigError
    from miles_train.megatron import specs
    from miles_train.megatron.model import build, initialize

    initialize(Layout(), timeout_s=60)
    try:
        build(Path(path), specs.model_spec(specs.read_config(Path(path))), Layout(), torch.float32)
    except ConfigError as error:
        return str(error)
    return ""


def spoil(path: Path, how: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    index = {"bad index": {"weight_map": []}, "shard missing": {"weight_map": {"x": "model-00001-of-00002.safetensors"}}}
    if how in index:
        (path / "model.safetensors.index.json").write_text(json.dumps(index[how]))
        return
    if how in ("no files", "truncated"):
        kept = file.read_bytes()[:-100]
        file.unlink()
        if how == "truncated":
            file.write_bytes(kept)
        return
    weights, norm = load_file(file), "model.layers.1.self_attn.q_norm.weight"
    if how == "missing":
        del weights[norm]
    elif how == "unknown":
        weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)
    elif how == "shape":
        weights[norm] = torch.zeros(9)
    elif how == "quantised":
        weights[norm] = torch.zeros(8, dtype=torch.int8)
    elif how == "nan":
        weights[norm][3] = torch.nan
    elif how == "tied twice":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file)


@pytest.mark.parametrize(
    "how, words",
    [
        ("no files", r"has no \*.safetensors"),
        ("truncated", "model.safetensors cannot be read: .*The download or export is incomplete"),
        ("bad index", "is not an index of safetensors"),
        ("shard missing", "model-00001-of-00002.safetensors cannot be read"),
        ("missing", "lacks 1 weights, the first is 'model.layers.1.self_attn.q_norm.weight'"),
        ("unknown", "holds 1 weights that .* have no place for, the first is 'model.layers.1.self_attn.q_proj.bias'"),
        ("shape", r"'model.layers.1.self_attn.q_norm.weight' is \[9\], by config.json it is \[8\]"),
        ("quantised", "'model.layers.1.self_attn.q_norm.weight' is I8; quantised"),
        ("nan", "1 of 8 numbers in 'model.layers.1.self_attn.q_norm.weight' are NaN or infinite"),
        ("tied twice", "^$"),
    ],
)
def test_bad_checkpoints(tmp_path: Path, how: str, words: str):
    path = write_model(tmp_path, **CONFIGS["tied"])
    spoil(path, how)
    assert re.search(words, run_ranks(load_one, 1, str(path))[0])
