"""Bad model directories: each a sentence that names file or weight, what was expected and what to do; for every reader alike."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fixtures.megatron import megatron_trainer

from miles_core import model_files
from miles_core.errors import ConfigError
from miles_core.headers import read_header
from miles_core.model_files import check_files, declared_ends, ends_of_text, refuse_not_finite, weight_shapes
from miles_core.models import materialize
from miles_core.tokenizers import TokenizerConfig

FIELDS = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = TokenizerConfig(kind="words", words=tuple("abcdefgh"))
    return materialize(None, FIELDS, words, [], tmp_path_factory.mktemp("good") / "model", 0)


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit(path: Path, **fields: object) -> None:
    """Set fields of a JSON file; None takes one out."""
    found = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def reshape(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the weights."""
    from safetensors.numpy import load_file, save_file

    weights = {name: weight.copy() for name, weight in load_file(path / "model.safetensors").items()}
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def in_shards(path: Path) -> dict[str, str]:
    """The weights in two files with an index, one a layer; gives the index."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(path / "model.safetensors")
    held = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in weights}
    for file in sorted(set(held.values())):
        save_file({n: w for n, w in weights.items() if held[n] == file}, path / file, metadata={"format": "pt"})
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    return held


def truncated(path: Path) -> str:
    file = path / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    return rf"model\.safetensors cannot be read: it has {size - 100:,} bytes, its header says {size:,}\. .* get the model again"


def header_cut(path: Path) -> str:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:40])
    return r"model\.safetensors cannot be read: JSONDecodeError"


def no_weights(path: Path) -> str:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    return r"has no model\.safetensors and no model\.safetensors\.index\.json.*pickled .* convert them"


def shard_missing(path: Path) -> str:
    in_shards(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    return r"model-00002-of-00002\.safetensors is missing, and 0 more of the 2 files that model\.safetensors\.index\.json names"


def index_of_another(path: Path) -> str:
    held = in_shards(path)
    held[UP] = "model-00001-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    return rf"model-00001-of-00002\.safetensors lacks '{UP}', which model\.safetensors\.index\.json says is there"


def index_without_map(path: Path) -> str:
    (path / "model.safetensors.index.json").write_text("{}")
    return r"is not an index of safetensors: it has no weight_map"


def config_damaged(path: Path) -> str:
    (path / "config.json").write_text('{"model_type')
    return r"config\.json cannot be read as JSON: .*; copy it again"


def no_model_type(path: Path) -> str:
    edit(path / "config.json", model_type=None)
    return r"config\.json has no model_type"


def other_width(path: Path) -> str:
    edit(path / "config.json", hidden_size=64)
    return r"'model\.embed_tokens\.weight' is \[10, 32\], by config\.json it is \[10, 64\]; they do not belong together"


def a_layer_lost(path: Path) -> str:
    edit(path / "config.json", num_hidden_layers=3, layer_types=None)
    return r"lacks layer 2: config\.json says num_hidden_layers 3, weights of 2 are there"


def tokenizer_of_another(path: Path) -> str:
    described = json.loads((path / "tokenizer.json").read_text())
    described["model"]["vocab"]["i"] = 10
    (path / "tokenizer.json").write_text(json.dumps(described))
    return r"does not match the model: its token 'i' has id 10, but config\.json says vocab_size 10"


IN_FILES = [
    truncated,
    header_cut,
    no_weights,
    shard_missing,
    index_of_another,
    index_without_map,
    config_damaged,
    no_model_type,
    other_width,
    a_layer_lost,
    tokenizer_of_another,
]


@pytest.mark.parametrize("spoil", IN_FILES)
def test_what_files_say(model: Path, spoil: Callable[[Path], str]):
    check_files(model)
    words = spoil(model)
    with pytest.raises(ConfigError, match=words) as error:
        check_files(model)
    assert str(model) in str(error.value)


def test_a_tokenizer_is_read_again_only_when_it_has_changed(model: Path, monkeypatch: pytest.MonkeyPatch):
    read, json_object = list[str](), model_files.json_object
    monkeypatch.setattr(model_files, "json_object", lambda path: read.append(path.name) or json_object(path))
    for _ in range(3):
        check_files(model)
    assert read.count("tokenizer.json") <= 1
    words = tokenizer_of_another(model)
    with pytest.raises(ConfigError, match=words):
        check_files(model)


def test_headers_agree_with_the_library(good: Path, model: Path):
    from safetensors.numpy import load_file

    in_shards(model)
    check_files(model)
    shapes = {n: s for file in model.glob("*.safetensors") for n, s in read_header(file).shapes.items()}
    assert shapes == weight_shapes(model) == {n: w.shape for n, w in load_file(good / "model.safetensors").items()}


def test_a_padded_vocabulary_and_added_tokens_are_no_mistake(model: Path):
    edit(model / "config.json", vocab_size=64)
    reshape(model, lambda weights: weights.update({"model.embed_tokens.weight": np.zeros((64, 32), np.float32)}))
    described = json.loads((model / "tokenizer.json").read_text())
    described["added_tokens"].append({"id": 99, "content": "<image>", "special": True})
    described["model"]["vocab"]["<image>"] = 99
    (model / "tokenizer.json").write_text(json.dumps(described))
    check_files(model)


def test_what_is_there_instead_of_a_model(good: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(good, run / "models" / "final" / "policy")
    (run / "run.json").write_text("{}")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "trainer.json").write_text("{}")
    for path, words in (
        (run, "This one is a run's: its models are .*final/policy"),
        (cut, "This one is a part of a run's cut: miles export RUN DIRECTORY --step STEP"),
        (run / "models" / "final", "Below it are: policy"),
    ):
        with pytest.raises(ConfigError, match=f"has no config.json; a model's path is a Hugging Face directory. {words}"):
            check_files(path)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (1, [1, 9], 1, {1, 9}),
        (1, [8, 9], 1, {1, 8, 9}),
        ([8, 9], None, 9, {8, 9}),
        (5, None, 1, {1}),
        (None, None, 1, {1}),
        (5, None, None, {5}),
        (None, None, None, set()),
    ],
)
def test_ids_that_end_a_text(tmp_path: Path, config: object, generation: object, tokenizer: int | None, expected: set[int]):
    """Chat models name several; ids that do not go with the tokenizer are some default's."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": config}}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert ends_of_text(tmp_path, SimpleNamespace(eos_token_id=tokenizer)) == expected
    assert ends_of_text(tmp_path, None) == declared_ends(tmp_path)


# What only reading tells


def other_inside(path: Path) -> str:
    edit(path / "config.json", intermediate_size=48)
    return r"'model\.layers\.0\.mlp\.down_proj\.weight' is \[32, 64\], by config\.json it is \[32, 48\]"


def a_layer_too_many(path: Path) -> str:
    edit(path / "config.json", num_hidden_layers=1, layer_types=None)
    return r"holds 11 weights .*config\.json .*, the first is 'model\.layers\.1\.input_layernorm\.weight'"


def unknown_architecture(path: Path) -> str:
    edit(path / "config.json", model_type="qwen9")
    return r"config\.json says model_type 'qwen9', which transformers .* does not know"


def strange_field(path: Path) -> str:
    edit(path / "config.json", hidden_act="nope")
    return r"cannot be read by transformers: KeyError: 'nope'"


def a_nan(path: Path) -> str:
    reshape(path, lambda weights: weights[UP].__setitem__((3, 4), np.nan))
    return rf"1 of 2,048 numbers in '{UP}' are NaN or infinite"


def infinities(path: Path) -> str:
    reshape(path, lambda weights: weights[UP].__setitem__(slice(0, 2), np.array([[np.inf], [-np.inf]])))
    return rf"64 of 2,048 numbers in '{UP}' are NaN or infinite"


def policy(path: Path) -> object:
    import torch

    from miles_train.torch_trainer.causal_lm import CausalLM

    return CausalLM.load(path, torch.float32, torch.device("cpu"))


def critic(path: Path) -> object:
    import torch

    from miles_train.torch_trainer.scalar_model import ScalarModel

    return ScalarModel.load(path, torch.float32, torch.device("cpu"))


def engine(path: Path) -> object:
    import torch

    from miles_rollout.local.model import load_model

    return load_model(path, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("read", [policy, critic, engine])
@pytest.mark.parametrize(
    "spoil", [truncated, shard_missing, other_inside, a_layer_too_many, unknown_architecture, strange_field, a_nan, infinities]
)
def test_trainer_and_engine_say_it_alike(model: Path, read: Callable[[Path], object], spoil: Callable[[Path], str]):
    read(model)
    words = spoil(model)
    with pytest.raises(ConfigError, match=words):
        read(model)


@pytest.mark.parametrize("spoil", [truncated, shard_missing, other_width, tokenizer_of_another])
def test_megatron_says_it_before_it_starts_ranks(model: Path, tmp_path: Path, spoil: Callable[[Path], str]):
    pytest.importorskip("megatron.core")
    words = spoil(model)
    with pytest.raises(ConfigError, match=words):
        megatron_trainer(model, tmp_path, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_large_sums_are_no_infinities(dtype: str):
    """Numbers whose sum overflows are numbers; one that is none is found among them."""
    import torch

    weight = torch.full((64, 64), torch.finfo(getattr(torch, dtype)).max, dtype=getattr(torch, dtype))
    refuse_not_finite([("w", weight)], Path("m"))
    weight[5, 6] = -torch.inf
    with pytest.raises(ConfigError, match=f"m: 1 of 4,096 numbers in 'w' .*as {dtype}"):
        refuse_not_finite([("w", weight)], Path("m"))


RECIPE = """
name: mine
data: {use: texts, texts: [a b]}
rollout: read
steps: 1
groups: 1
models: {policy: {path: MODEL, trainer: torch, losses: {nll: nll}}}
"""


def test_miles_check_says_it_without_torch(model: Path, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("MODEL", str(model)))
    words = "it has 78,2"
    truncated(model)
    code = (
        f"import sys; sys.argv = ['miles', 'check', {str(tmp_path / 'mine.yaml')!r}]\n"
        "from miles_core.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout.split() == ["False"]
    assert words in " ".join(done.stderr.split()) and "model policy:" in done.stderr
