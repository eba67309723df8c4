"""Models from scratch: drawn from the seed alone, built once, and a sentence for every wrong setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from miles_core.errors import ConfigError, DataError
from miles_core.models import materialize
from miles_core.tokenizers import TokenizerConfig, load_tokenizer

DENSE = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
MOE = DENSE | {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
WORDS = TokenizerConfig(kind="words", words=(*"0123456789", " + ", " ?"))
BPE = TokenizerConfig(kind="bpe", vocab_size=270)


def build(directory: Path, config=DENSE, tokenizer=WORDS, texts=("1 + 2 ?",), seed=1) -> Path:
    return materialize(None, config, tokenizer, texts, directory, seed)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_transformers_loads_what_was_built(tmp_path: Path, config: dict) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = build(tmp_path / "runs" / "model", config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), load_tokenizer(path)
    assert model.config.model_type == config["model_type"] and model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == len(WORDS.words) + 2
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    logits = model(torch.tensor([tokenizer.encode("1 + 2 ?")])).logits
    assert logits.shape == (1, 4, len(tokenizer)) and torch.isfinite(logits).all()
    spread = model.model.embed_tokens.weight[1:].std().item()
    assert abs(spread - 0.05) < 0.01  # initializer_range; the first row, the padding, is zero
    assert [p.name for p in path.parent.iterdir()] == ["model"]  # nothing half-built is left


def test_weights_follow_from_the_seed_and_nothing_else_is_drawn(tmp_path: Path) -> None:
    import torch

    def weights(name: str, seed: int) -> bytes:
        return (build(tmp_path / name, seed=seed) / "model.safetensors").read_bytes()

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights("a", 1)
    assert torch.equal(torch.rand(3), expected)  # the caller's random state went on untouched
    assert weights("b", 1) == first
    assert weights("c", 2) != first


def test_the_same_inputs_are_built_once(tmp_path: Path) -> None:
    directory = build(tmp_path / "m", tokenizer=BPE)
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert build(directory, tokenizer=BPE) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changed",
    [{"seed": 2}, {"texts": ("3 + 4 ?",)}, {"config": DENSE | {"hidden_size": 64}}, {"tokenizer": WORDS}],
    ids=lambda c: next(iter(c)),
)
def test_other_inputs_build_again(tmp_path: Path, changed: dict) -> None:
    inputs = {"tokenizer": BPE}
    directory = build(tmp_path / "m", **inputs)
    before = (directory / "model.safetensors").stat().st_ino
    build(directory, **(inputs | changed))
    assert (directory / "model.safetensors").stat().st_ino != before
    hidden = changed.get("config", DENSE)["hidden_size"]
    assert json.loads((directory / "config.json").read_text())["hidden_size"] == hidden
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_closed_vocabulary_does_not_read_all_texts(tmp_path: Path) -> None:
    """A data source may make a million problems."""

    def endless():
        while True:
            yield "1 + 2 ?"

    assert build(tmp_path / "m", texts=endless()) == tmp_path / "m"


def test_what_was_not_built_by_miles_stays(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="was not built by Miles"):
        build(tmp_path / "m")
    assert (tmp_path / "m" / "thesis.tex").read_text() == "mine"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"writes ' \* '"):
        build(tmp_path / "m", texts=["1 * 2 ?"])
    with pytest.raises(ConfigError):
        build(tmp_path / "m", config=DENSE | {"hidden_act": "nope"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DENSE | {"model_type": "qwen33"}, "no model_type 'qwen33'. Did you mean 'qwen3'?"),
        ({"hidden_size": 8}, "no model_type ''"),
        (DENSE | {"hiden_size": 8}, "qwen3 has no field 'hiden_size'. Did you mean 'hidden_size'?"),
        (DENSE | {"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        (DENSE | {"vocab_size": 100}, "vocab_size follows from the tokenizer"),
        (DENSE | {"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"model_type": "clip"}, "no language model can be built"),
    ],
)
def test_a_wrong_config_names_the_field(tmp_path: Path, config: dict, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(tmp_path / "m", config)
    assert expected in str(error.value)


def test_a_local_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(tmp_path / "m")
    monkeypatch.setenv("MODELS_ARE_IN", str(tmp_path))
    for path in (str(built), "${MODELS_ARE_IN}/m"):
        assert materialize(path, None, None, [], tmp_path / "unused", 0) == built
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("{}", "has no config.json"),
        ("{}/nowhere", "neither a directory nor a hub id"),
        ("owner/no-such-model", "cannot be fetched from the Hugging Face hub"),
        (None, "needs a path"),
    ],
)
def test_a_wrong_path_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None, expected: str) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=expected):
        materialize(path and path.format(tmp_path), None, None, [], tmp_path / "m", 0)


def test_models_without_path_start_as_the_one_they_belong_to(tmp_path):
    """Whatever the names, and whatever else an earlier stage has handed on."""
    from miles_core.assembly import model_paths
    from miles_core.config import resolve
    from miles_core.run_dir import RunDir

    (tmp_path / "r.yaml").write_text(
        """
data: {use: texts, texts: [a]}
rollout: read_pairs
groups: 1
steps: 1
stages:
  first: {models: {policy: {path: x, trainer: torch, losses: {n: nll}}}}
  second:
    models:
      reference: {role: reference, trainer: torch}
      student: {path: %s, trainer: torch, losses: {n: nll}}
  third:
    models:
      judge: {role: reward, of: policy, trainer: torch, losses: {b: bradley_terry}, advantage: preference, aggregation: sequence_mean}
"""
        % (tmp_path / "student")
    )
    run_dir = RunDir(tmp_path)
    build(tmp_path / "student")
    for made in ("models/second/policy", "models/third/policy"):
        (tmp_path / made).mkdir(parents=True)
        (tmp_path / made / "config.json").write_text("{}")
    config = resolve(str(tmp_path / "r.yaml"))
    student = tmp_path / "student"
    assert model_paths(config, "second", run_dir, []) == {"student": student, "reference": student}
    assert model_paths(config, "third", run_dir, []) == {"judge": run_dir.models / "third" / "policy"}
