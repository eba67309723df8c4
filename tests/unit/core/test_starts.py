"""What models begin with: directories and adapters, told apart without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miles_core import adapters
from miles_core.config import RunConfig
from miles_core.errors import ConfigError, DataError
from miles_core.inspection.tokens import tokenizer_directory
from miles_core.lora import WEIGHTS, Lora, base_digest, read_config
from miles_core.model_files import check_files
from miles_core.run_dir import RunDir
from miles_core.starts import Start, starts


def tensors(file: Path, shape: tuple[int, ...] = (3, 2), value: int = 0, metadata: dict[str, str] | None = None) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"model.embed_tokens.weight": np.full(shape, value, np.float32)}, file, metadata=metadata)


def model(directory: Path, value: int = 0) -> Path:
    tensors(directory / "model.safetensors", value=value)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 3, "hidden_size": 2}))
    return directory


def adapter(directory: Path, base: str | Path | None, **fields: Any) -> Path:
    tensors(directory / WEIGHTS)
    said = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": base and str(base)} | fields
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


def begun(models: dict[str, dict[str, Any]], paths: dict[str, Path], directory: Path) -> dict[str, Start]:
    """Of a stage with these models; each has ``trainer: torch`` unless it says otherwise."""
    stage: dict[str, Any] = {"steps": 1, "groups": 1, "data": {"use": "texts", "texts": ["-"]}, "rollout": "read"}
    stage["models"] = {name: {"trainer": "torch"} | options for name, options in models.items()}
    config = RunConfig.from_mapping({"name": "x", "trackers": {}, "stages": {"main": stage}})
    return starts(config.stages["main"], paths, directory, 7)


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path, Path]]:
    """What would have been merged."""
    made: list[tuple[Path, Path, Path]] = []
    monkeypatch.setattr(adapters, "merge", lambda *paths: (made.append(paths), model(paths[2])))
    return made


def test_a_new_adapter_is_what_the_recipe_says(tmp_path: Path):
    base = model(tmp_path / "base")
    assert begun({"policy": {"path": str(base), "lora": {}}}, {"policy": base}, tmp_path) == {
        "policy": Start(base, Lora(str(base), None, 16, 32, None, 7))
    }
    given = {"rank": 3, "alpha": 5, "targets": ["q_proj", "v_proj"]}
    found = begun({"policy": {"path": "owner/name", "lora": given}}, {"policy": base}, tmp_path)["policy"].lora
    assert found == Lora("owner/name", None, 3, 5, ("q_proj", "v_proj"), 7)
    assert begun({"policy": {"path": str(base)}}, {"policy": base}, tmp_path) == {"policy": Start(base)}


def test_who_reads_an_adapter_and_who_merges_it(tmp_path: Path, merges: list[tuple[Path, Path, Path]]):
    base = model(tmp_path / "base")
    given = adapter(tmp_path / "adapter", base)
    models: dict[str, dict[str, Any]] = {
        "policy": {"lora": {}},
        "reference": {"role": "reference"},
        "far": {"role": "reference", "trainer": "megatron"},
        "critic": {"role": "critic"},
    }
    found = begun(models, dict.fromkeys(models, given), tmp_path / "stage")
    as_it_is = Start(base, Lora(str(base), given))
    merged = {name: Start(tmp_path / "stage" / name / "merged") for name in ("far", "critic")}
    assert found == {"policy": as_it_is, "reference": as_it_is} | merged
    assert merges == [(given, base, tmp_path / "stage" / name / "merged") for name in ("far", "critic")]
    assert begun(models, dict.fromkeys(models, given), tmp_path / "stage") == found and len(merges) == 2  # a resumed run has them


def test_who_belongs_to_a_policy_begins_with_its_adapter(tmp_path: Path, merges: list[tuple[Path, Path, Path]]):
    base, own = model(tmp_path / "base"), model(tmp_path / "own")
    given = adapter(tmp_path / "adapter", None)
    models: dict[str, dict[str, Any]] = {
        "policy": {"path": str(base), "lora": {"path": str(given)}},
        "reference": {"role": "reference"},
        "critic": {"role": "critic"},
        "teacher": {"role": "teacher", "path": str(own)},
    }
    paths = {"policy": base, "reference": base, "critic": base, "teacher": own}
    as_it_is = Start(base, Lora(str(base), given))
    found = begun(models, paths, tmp_path / "stage")
    assert found == {"policy": as_it_is, "reference": as_it_is, "critic": Start(tmp_path / "stage/critic/merged"), "teacher": Start(own)}
    fresh = {"policy": models["policy"] | {"lora": {}}, "reference": models["reference"]}
    assert begun(fresh, {"policy": base, "reference": base}, tmp_path / "s")["reference"] == Start(base)


@pytest.mark.parametrize(
    "base, sentence",
    [
        (None, "does not name its model"),
        ("owner/name@v2", "names revision 'v2' of owner/name, and only the newest of a model is fetched; get that revision"),
        ("/gone/away/far", "names '/gone/away/far' as its model: .* Or give the model as path and the adapter as lora.path"),
        ("{adapter}", "which is an adapter too; merge that one first"),
    ],
)
def test_an_adapter_without_its_model_is_a_sentence(tmp_path: Path, base: str | None, sentence: str):
    other = adapter(tmp_path / "other", "x")
    named, _, revision = (base or "").format(adapter=other).partition("@")
    given = adapter(tmp_path / "adapter", named or None, revision=revision or None)
    with pytest.raises(ConfigError, match=sentence):
        begun({"policy": {"lora": {}}}, {"policy": given}, tmp_path / "stage")


def test_an_adapter_is_not_described_twice(tmp_path: Path):
    base = model(tmp_path / "base")
    given, own = adapter(tmp_path / "adapter", base), adapter(tmp_path / "stage" / "policy", base)
    with pytest.raises(ConfigError, match=r"lora: the adapter in .*adapter brings its own rank, targets; leave that out \(null\)"):
        begun({"policy": {"lora": {"rank": 4, "targets": ["q_proj"]}}}, {"policy": given}, tmp_path / "stage")
    handed_on = begun({"policy": {"lora": {"rank": 4}}}, {"policy": own}, tmp_path / "stage")["policy"]
    assert handed_on == Start(base, Lora(str(base), own))  # by the stage before, which has described it alike


def test_a_stage_goes_on_beside_the_weights_it_began_with(tmp_path: Path):
    """Its cuts hold the adapter alone."""
    base = model(tmp_path / "base")
    given = adapter(tmp_path / "adapter", base)
    models: dict[str, dict[str, Any]] = {"policy": {"path": str(base), "lora": {}}, "reference": {"role": "reference"}}
    paths = {"policy": base, "reference": given}
    found = begun(models, paths, tmp_path / "stage")
    assert begun(models, paths, tmp_path / "stage") == found
    model(base, value=1)
    for name in models:
        with pytest.raises(DataError, match=r"base holds other weights than when the stage began, and the run has an adapter of those"):
            begun({name: models[name]} | {"policy": models["policy"]}, {name: paths[name]}, tmp_path / "stage")
    begun(models, paths, tmp_path / "another")


def test_an_adapter_may_bring_a_tokenizer(tmp_path: Path):
    base = model(tmp_path / "base")
    given = adapter(tmp_path / "adapter", base)
    assert Start(base).tokenizer == Start(base, Lora("x")).tokenizer == Start(base, Lora("x", given)).tokenizer == base
    (given / "tokenizer_config.json").write_text("{}")
    assert Start(base, Lora("x", given)).tokenizer == given


def test_a_run_is_looked_at_with_the_tokenizer_of_an_adapters_model(tmp_path: Path):
    """Until it has exported one of its own."""
    base = model(tmp_path / "base")
    given, run = adapter(tmp_path / "adapter", base), RunDir(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(json.dumps({"stages": {"main": {"models": {"policy": {"path": str(given)}}}}}))
    assert tokenizer_directory(run, "policy") is None
    (base / "tokenizer_config.json").write_text("{}")
    assert tokenizer_directory(run, "policy") == base


def test_a_directory_holds_a_model_or_an_adapter(tmp_path: Path):
    """transformers would read their sum."""
    both = adapter(model(tmp_path / "both"), "x")
    with pytest.raises(ConfigError, match=r"both holds a model \(config.json\) and an adapter \(adapter_config.json\), which"):
        check_files(both)


def test_a_whole_model_is_no_adapter(tmp_path: Path):
    base = model(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"lora.path: .*base holds a whole model, no adapter \(adapter_config.json\)"):
        begun({"policy": {"path": str(base), "lora": {"path": str(base)}}}, {"policy": base}, tmp_path)


def test_a_base_is_known_by_its_weights_however_they_are_spread(tmp_path: Path):
    import numpy as np
    from safetensors.numpy import save_file

    a, b = (np.random.default_rng(i).standard_normal((40, 50)).astype(np.float32) for i in (0, 1))
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
    save_file({"a": a, "b": b}, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    save_file({"b": b}, tmp_path / "two" / "model-1.safetensors")
    save_file({"a": a}, tmp_path / "two" / "model-2.safetensors")
    save_file({"a": a, "b": b + 1e-6}, tmp_path / "other" / "model.safetensors")
    assert base_digest(tmp_path / "one") == base_digest(tmp_path / "two") != base_digest(tmp_path / "other")


def test_a_config_that_is_none_is_a_sentence(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config.json cannot be read as JSON: .*; give a PEFT directory"):
        read_config(tmp_path)
