"""Tables, layouts, cuts and the bridge of the megatron trainer: what is refused, and in which words. No ranks but one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.ranks import run_ranks
from fixtures.training import COMMON, MODELS

from miles_core.errors import ConfigError
from miles_train.megatron.cuts import Cut, local_shape, pieces
from miles_train.megatron.fitting import problems
from miles_train.megatron.qwen3 import QWEN3
from miles_train.megatron.specs import ModelSpec, model_spec, read_config
from miles_train.ranks.layout import Layout

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    **COMMON,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


# Tables


def test_configs_of_both_generations_of_transformers_mean_the_same():
    old = {k: v for k, v in MOE.items() if k not in ("rope_parameters", "num_experts")}
    old |= {"rope_theta": 1e6, "rope_scaling": None, "num_local_experts": 8, "sliding_window": 4096, "use_sliding_window": False}
    spec = model_spec(MOE)
    assert spec.transformer(old) == spec.transformer(MOE)
    assert spec.model(old) == spec.model(MOE) == {
        "vocab_size": 41,
        "max_sequence_length": 64,
        "rotary_base": 1e6,
        "share_embeddings_and_output_weights": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, expected",
    [({}, (0, 1)), ({"mlp_only_layers": [0]}, (1,)), ({"decoder_sparse_step": 2}, (1,)), ({"mlp_only_layers": [0, 1]}, ())],
)
def test_which_layers_have_experts(change: dict[str, Any], expected: tuple[int, ...]):
    config = MOE | change
    spec = model_spec(config)
    assert spec.moe_layers(config) == expected
    names = {name for p in spec.parameters(config) for name, _ in p.tensors}
    assert {layer for layer in range(2) if f"model.layers.{layer}.mlp.gate.weight" in names} == set(expected)
    assert {layer for layer in range(2) if f"model.layers.{layer}.mlp.gate_proj.weight" in names} == {0, 1} - set(expected)
    assert len([n for n in names if ".experts." in n]) == 3 * 8 * len(expected)
    assert QWEN3.moe_layers(DENSE) == ()


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen3-0.6B": (
        dict(
            architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
            head_dim=128, hidden_act="silu", hidden_size=1024, initializer_range=0.02, intermediate_size=3072,
            max_position_embeddings=40960,
            max_window_layers=28, model_type="qwen3", num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
            rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True,
            torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True, use_sliding_window=False, vocab_size=151936,
        ),
        310,
    ),
    "Qwen3-30B-A3B": (
        dict(
            architectures=["Qwen3MoeForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643, decoder_sparse_step=1,
            eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=6144,
            max_position_embeddings=40960, max_window_layers=48, mlp_only_layers=[], model_type="qwen3_moe", moe_intermediate_size=768,
            norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
            num_key_value_heads=4, output_router_logits=False, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000.0,
            router_aux_loss_coef=0.001, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
            transformers_version="4.51.0", use_cache=True, use_sliding_window=False, vocab_size=151936,
        ),
        18867,
    ),
}  # fmt: skip
"""config.json as Qwen published it, and the number of weights in the checkpoint."""


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models(name: str):
    """As many numbers as transformers' model of that config has."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config, count = PUBLISHED[name]
    parameters = [p for p in model_spec(config).parameters(config) if not p.copy]
    assert len({n for p in parameters for n, _ in p.tensors}) == sum(len(p.tensors) for p in parameters) == count
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert sum(prod(shape) for p in parameters for _, shape in p.tensors) == sum(p.numel() for p in model.parameters())
    assert problems(Layout(tensor=4, pipeline=2, expert=4), config) == ([] if "num_experts" in config else [NO_EXPERTS])


NO_EXPERTS = "4 expert-parallel ranks, but Qwen3ForCausalLM has no experts; leave expert at 1"

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"architectures": ["LlamaForCausalLM"]},
        "architectures says 'LlamaForCausalLM'.*known are Qwen3ForCausalLM, Qwen3MoeForCausalLM.*miles.model_spec",
    ),
    ({"architectures": None}, "has no architectures"),
    ({"architectures": []}, "has no architectures"),
    ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"head_dim": None}, "lacks 'head_dim'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4}}, "rope_parameters asks for scaled"),
    ({"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "asks for scaled"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "scaled or partial"),
    ({"rope_parameters": None}, "lacks 'rope_parameters'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu'"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention' layers"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is .*does not know"),
    ({"logit_scale": 0.5}, "logit_scale is 0.5.*does not know"),
    ({"num_experts_per_tok": 1}, "norm_topk_prob is true with one expert"),
]  # fmt: skip


@pytest.mark.parametrize("change, words", REFUSED)
def test_what_a_table_does_not_know_is_refused(change: dict[str, Any], words: str):
    config = {k: v for k, v in (MOE | change).items() if v is not None}
    with pytest.raises(ConfigError, match=words):
        model_spec(config)


def test_unknown_but_empty_fields_are_harmless():
    model_spec(DENSE | {"some_new_switch": False, "another": None, "lists": [], "tables": {}})


class _Entry:
    """An entry point of a package that is not installed."""

    dist = None
    name, value = "Other", "other_package:SPEC"

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load


def test_a_table_from_another_package(monkeypatch: pytest.MonkeyPatch):
    spec = ModelSpec("Other", "other", QWEN3.fields, QWEN3.ignored, QWEN3.constants, QWEN3.sizes, QWEN3.weights)

    read = metadata.entry_points
    ours = list(read(group="miles.model_spec"))

    def installed(load: Callable[[], Any]) -> None:
        monkeypatch.setattr(
            metadata, "entry_points", lambda group: [*ours, _Entry(load)] if group == "miles.model_spec" else read(group=group)
        )

    other = DENSE | {"architectures": ["Other"]}
    installed(lambda: spec)
    assert model_spec(other) is spec
    with pytest.raises(ConfigError, match=r"known are Other, Qwen3ForCausalLM"):
        model_spec(DENSE | {"architectures": ["Unknown"]})
    installed(lambda: QWEN3)
    with pytest.raises(ConfigError, match=r"must be a ModelSpec of that architecture"):
        model_spec(other)
    installed(lambda: 1 / 0)
    with pytest.raises(ConfigError, match=r"'Other' .*other_package:SPEC.* does not import: ZeroDivisionError"):
        model_spec(other)


def test_read_config(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        read_config(tmp_path)
    file.write_text(json.dumps(DENSE))
    assert read_config(tmp_path) == DENSE


# Cuts


def whole(cut: Cut) -> tuple[list[np.ndarray], int]:
    """Tensors whose elements are all different, and the number of key/value heads."""
    shapes = {
        "replicated": [(6, 5)],
        "column": [(8, 5)],
        "row": [(5, 8)],
        "vocab": [(11, 3)],
        "fused_qkv": [(16, 3), (8, 3), (8, 3)],  # 8 heads of 2, 4 key/value heads
        "gate_up": [(8, 3), (8, 3)],
    }[cut]
    numbers = iter(range(10_000))
    return [np.array([next(numbers) for _ in range(a * b)]).reshape(a, b) for a, b in shapes], 4


EXPECTED: dict[str, Callable[[list[np.ndarray], int, int], np.ndarray]] = {
    "replicated": lambda t, rank, size: t[0],
    "column": lambda t, rank, size: np.split(t[0], size)[rank],
    "row": lambda t, rank, size: np.split(t[0], size, 1)[rank],
    "vocab": lambda t, rank, size: np.split(np.pad(t[0], ((0, -11 % size), (0, 0)), constant_values=-1), size)[rank],
    # heads of the model, in groups of those that share a key/value head
    "fused_qkv": lambda t, rank, size: np.split(
        np.concatenate([t[0].reshape(4, 4, 3), t[1].reshape(4, 2, 3), t[2].reshape(4, 2, 3)], 1), size
    )[rank].reshape(-1, 3),
    "gate_up": lambda t, rank, size: np.stack([x.reshape(size, -1, 3) for x in t])[:, rank].reshape(-1, 3),
}
"""What megatron's modules expect of each rank; −1 where the vocabulary is padded."""


@pytest.mark.parametrize("cut, size", list(product(EXPECTED, (1, 2, 4))))
def test_cuts(cut: Cut, size: int):
    tensors, groups = whole(cut)
    shapes = [t.shape for t in tensors]
    for rank in range(size):
        parts = [np.take(tensors[p.tensor], range(p.start, p.stop), p.axis) for p in pieces(cut, shapes, rank, size, groups)]
        local = np.concatenate(parts)
        expected = EXPECTED[cut](tensors, rank, size)
        assert local_shape(cut, shapes, size) == expected.shape
        assert (local == expected[: len(local)]).all()
        assert (expected[len(local) :] == -1).all()


# Layouts


def layouts() -> list[Layout]:
    """Of up to 16 ranks."""
    every = [Layout(*sizes) for sizes in product((1, 2, 4), (1, 2), (1, 2), (1, 2, 4), (1, 2, 3))]
    return [layout for layout in every if layout.world_size <= 16 and layout.stage_size % layout.expert == 0]


def megatron_groups(rank: int, size: int, every: list[tuple[int, ...]]) -> list[dict[str, list[list[int]]]]:
    """Of each layout, megatron's groups along each axis."""
    from miles_train.megatron import model  # noqa: F401, installs the bridge

    from megatron.core.parallel_state import RankGenerator  # isort: skip

    result = []
    for tensor, pipeline, context, expert, data in every:
        order = "tp-cp-ep-dp-pp"
        dense = RankGenerator(tensor, 1, data, pipeline, context, order)
        experts = RankGenerator(1, expert, tensor * context * data // expert, pipeline, 1, order)
        result.append(
            {
                "tensor": dense.get_ranks("tp"),
                "context": dense.get_ranks("cp"),
                "data": dense.get_ranks("dp"),
                "pipeline": dense.get_ranks("pp"),
                "expert": experts.get_ranks("ep"),
                "expert_data": experts.get_ranks("dp"),
            }
        )
    return result


def test_ranks_stand_where_megatron_puts_them():
    every = layouts()
    assert len(every) > 50
    sizes = [(x.tensor, x.pipeline, x.context, x.expert, x.data) for x in every]
    for layout, groups in zip(every, run_ranks(megatron_groups, 1, sizes)[0], strict=True):
        for axis, of_axis in groups.items():
            assert sorted(r for group in of_axis for r in group) == list(range(layout.world_size))
            for group in of_axis:
                assert [getattr(layout.coordinates(r), axis) for r in group] == list(range(len(group))), (layout, axis)
        for rank in range(layout.world_size):
            here = layout.coordinates(rank)
            assert (layout.dense_rank(here.pipeline, here.tensor) == rank) == (here.data == here.context == 0)
            assert (layout.expert_rank(here.pipeline, here.expert) == rank) == (here.expert_data == 0)


@pytest.mark.parametrize(
    "layout, config, words",
    [
        (Layout(tensor=3), DENSE, ["3 tensor-parallel ranks cannot share 4 attention heads", "2 key/value heads"]),
        (Layout(tensor=4), DENSE, ["4 tensor-parallel ranks cannot share 2 key/value heads evenly; choose a number of tensor-"]),
        (Layout(tensor=2), DENSE | {"intermediate_size": 49}, ["49 columns in an MLP"]),
        (Layout(pipeline=3), DENSE, ["3 pipeline-parallel ranks cannot share 2 layers"]),
        (Layout(expert=3, data=3), MOE, ["3 expert-parallel ranks cannot share 8 experts"]),
        (Layout(expert=2), MOE, ["2 expert-parallel ranks do not divide the tensor × context × data = 1 ranks"]),
        (Layout(expert=2, data=2), DENSE, ["Qwen3ForCausalLM has no experts"]),
        (Layout(tensor=2), DENSE | {"vocab_size": 1}, ["a vocabulary of 1 leaves"]),
        (Layout(data=0), DENSE, ["the data-parallel size is 0"]),
    ],
)  # fmt: skip
def test_what_does_not_divide(layout: Layout, config: dict[str, Any], words: list[str]):
    found = problems(layout, config)
    assert len(found) == len(words)
    for sentence, part in zip(found, words, strict=True):
        assert part in sentence


def test_what_divides():
    assert problems(Layout(tensor=2, pipeline=2, context=2, data=3), DENSE) == []
    assert problems(Layout(tensor=2, pipeline=2, expert=4, data=2), MOE) == []
    assert problems(Layout(tensor=2), DENSE | {"vocab_size": 43}) == []
    assert problems(Layout(), MODELS["moe"] | MOE) == []


# Imports


def test_tables_and_layouts_need_no_torch():
    modules = "miles_train.megatron.fitting, miles_train.megatron.qwen3"
    code = f"import sys, {modules}; print([m for m in sys.modules if m in ('torch', 'megatron')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_bridge_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch):
    from miles_train.megatron import bridge

    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, bridge._Finder)])
    monkeypatch.setattr(bridge.torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "megatron.core", sys)
    with pytest.raises(ConfigError, match="was imported before"):
        bridge.install()
    monkeypatch.setattr(bridge.metadata, "version", lambda name: "0.17.0")
    with pytest.raises(ConfigError, match=r"megatron-core is 0.17.0.*install megatron-core==0.16.1"):
        bridge.install()

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(bridge.metadata, "version", missing)
    with pytest.raises(ConfigError, match="needs megatron-core"):
        bridge.install()
    assert not any(isinstance(f, bridge._Finder) for f in sys.meta_path)


def test_the_bridge_does_nothing_where_cuda_is(monkeypatch: pytest.MonkeyPatch):
    from miles_train.megatron import bridge

    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, bridge._Finder)])
    monkeypatch.setattr(bridge.torch.cuda, "is_available", lambda: True)
    before = list(sys.meta_path)
    bridge.install()
    assert sys.meta_path == before


def test_the_bridge_knows_every_place(tmp_path: Path):
    """The rewritten sources of the installed wheel name no device that is not there, but in annotations and never-taken branches."""
    from miles_train.megatron import bridge

    root = metadata.distribution("megatron-core").locate_file("megatron/core")
    for name in bridge.REWRITTEN:
        source = Path(str(root), *name.split(".")).with_suffix(".py").read_text()
        rewritten = bridge.rewrite(f"megatron.core.{name}", source)
        assert rewritten != source
        assert len(rewritten.splitlines()) == len(source.splitlines())  # tracebacks still fit the files
        compile(rewritten, name, "exec")
        assert "device='cuda'" not in rewritten and 'device="cuda")' not in rewritten
        with pytest.raises(ConfigError, match=f"{name} names CUDA in .* the installed package was modified"):
            bridge.rewrite(f"megatron.core.{name}", source + "\nx = torch.zeros(1, device='cuda')\n")


@pytest.mark.slow
def test_importing_is_quiet():
    code = "import miles_train.megatron.weights"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
