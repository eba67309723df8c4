"""What critics and reward models of `trainer: torch` refuse, and what they keep together (their numbers are in tests/differential)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.training import COMMON, build_trainer, ragged_batch, same, toy_pairs, toy_value, weights, write_model, write_scalar_model

from miles_core.columns import Attachment, Attachments, Blob, Ragged
from miles_core.errors import CheckpointError, ConfigError, DataError
from miles_core.protocols import LossInputs, LossOutputs, LossTerm

VALUES = frozenset({"values"})


@pytest.fixture(scope="session")
def scalar(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scalar_model(tmp_path_factory.mktemp("scalar"), dense)


def without(path: Path, to: Path, name: str) -> Path:
    """A copy of a model's directory that lacks one weight."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(path, to, dirs_exist_ok=True)
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


# Models that it does not take


def test_a_saved_critic_that_lacks_its_head_is_refused(scalar: Path, tmp_path: Path):
    """It is no language model whose head may start at 0: something went wrong when it was saved."""
    with pytest.raises(ConfigError, match=r"lacks 1 weights of Qwen3ForSequenceClassification, the first is 'score.weight'"):
        build_trainer(without(scalar, tmp_path, "score.weight"), role="critic", losses={})


def test_a_language_model_that_lacks_another_weight_is_refused(dense: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"lacks 1 weights.*'model.norm.weight'"):
        build_trainer(without(dense, tmp_path, "model.norm.weight"), role="reward", losses={})


def test_a_directory_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        build_trainer(tmp_path / "nowhere", role="critic", losses={})


def test_several_labels_are_refused(dense: Path, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(dense, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"classifies into 3 labels; a critic or reward model has one"):
        build_trainer(tmp_path, role="reward", losses={})


def test_another_head_is_not_dropped_without_a_word(dense: Path, tmp_path: Path):
    """A model that labels tokens has a bias beside its score."""
    from transformers import AutoModelForTokenClassification

    AutoModelForTokenClassification.from_pretrained(dense, num_labels=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a Qwen3ForTokenClassification; a critic or reward model is made of"):
        build_trainer(tmp_path, role="reward", losses={})


def test_a_model_that_transformers_has_no_classifier_for_is_refused(tmp_path: Path):
    path = write_model(tmp_path, model_type="granite", **COMMON)
    with pytest.raises(ConfigError, match=r"transformers has no granite model with a scalar head"):
        build_trainer(path, role="critic", losses={})


def test_a_classifier_of_another_make_is_refused(tmp_path: Path):
    sizes = {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
    path = write_model(tmp_path, model_type="roberta", is_decoder=True, **sizes)
    with pytest.raises(ConfigError, match=r"RobertaForSequenceClassification has no scalar head 'score'"):
        build_trainer(path, role="critic", losses={})


def test_a_model_that_changes_what_its_head_says_is_refused(scalar: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import Qwen3ForSequenceClassification

    plain = Qwen3ForSequenceClassification.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = 1.01 * output.logits
        return output

    monkeypatch.setattr(Qwen3ForSequenceClassification, "forward", scaled)
    with pytest.raises(ConfigError, match=r"the output of Qwen3ForSequenceClassification is not score\(hidden\) of the last token"):
        build_trainer(scalar, role="critic", losses={})


def test_packing_is_refused_where_samples_would_see_each_other(tmp_path: Path):
    small = {k: COMMON[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    path = write_model(tmp_path, model_type="falcon", alibi=True, **small)
    build_trainer(path, role="critic", losses={}, layout="padded")
    with pytest.raises(ConfigError, match="use layout: auto or padded"):
        build_trainer(path, role="critic", losses={}, layout="packed")


# Columns


@pytest.mark.parametrize(
    "role, column", [("critic", "old_logprobs"), ("reward", "ref_logprobs"), ("policy", "values"), ("teacher", "values")]
)
async def test_a_role_gives_its_own_columns_only(dense: Path, role: str, column: str):
    with pytest.raises(ConfigError, match=rf"a {role} of trainer 'torch' cannot give '{column}'"):
        await build_trainer(dense, role=role, losses={}).annotate(ragged_batch(), frozenset({column}))


@pytest.mark.parametrize("role, column", [("policy", "old_logprobs"), ("reference", "ref_logprobs"), ("teacher", "teacher_logprobs")])
async def test_language_models_have_roles_too(dense: Path, role: str, column: str):
    batch = ragged_batch()
    annotated = await build_trainer(dense, role=role, losses={}).annotate(batch, frozenset({column}))
    assert np.flatnonzero(np.isnan(annotated.array(column))).tolist() == (batch.cu_seqlens[1:] - 1).tolist()


async def test_how_a_token_was_sampled_does_not_matter_to_a_critic(scalar: Path):
    """Temperature 0 and a restricted support, which a language model refuses or has nothing to say of."""
    plain, restricted = ragged_batch(), ragged_batch()
    for ref in restricted.refs:
        sample = ref.get()
        sample.columns["support"] = Ragged.of([[int(t)] for t in sample.tokens], "int32")
        sample.spans = []
    critic = build_trainer(scalar, role="critic", losses={})
    values = [(await critic.annotate(b, VALUES)).array("values") for b in (plain, restricted)]
    np.testing.assert_array_equal(values[0], values[1])


async def test_an_image_is_refused(scalar: Path):
    batch = ragged_batch()
    sample = batch.refs[2].get()
    sample.columns["images"] = Attachments((Attachment(0, 1, Blob({"pixels": np.zeros(3, np.float32)})),), len(sample))
    with pytest.raises(DataError, match=rf"sample {batch.refs[2].id} has a column 'images'"):
        await build_trainer(scalar, role="critic", losses={}).annotate(batch, VALUES)


async def test_a_token_outside_the_vocabulary_names_its_sample(scalar: Path):
    batch = ragged_batch()
    batch.refs[4].get().tokens[0] = 41
    with pytest.raises(DataError, match=rf"sample {batch.refs[4].id} holds token id 41; the model's ids are 0 to 40"):
        await build_trainer(scalar, role="critic", losses={}).annotate(batch, VALUES)


# Units


@pytest.mark.parametrize("unit, expected", [("token", "sequence"), ("sequence", "sequence"), ("pair", "group"), ("group", "group")])
def test_the_unit_is_that_of_the_losses(scalar: Path, unit: Any, expected: str):
    losses = {"value": LossTerm(toy_value), "other": LossTerm(toy_value, unit=unit)}
    assert build_trainer(scalar, role="critic", losses=losses).unit == expected


async def test_groups_and_trajectories_are_never_split(scalar: Path):
    """With the smallest micro-batches: three groups of four samples for a loss of groups, else nine trajectories."""
    seen: list[tuple[list[int], list[int]]] = []

    def looks(inputs: LossInputs) -> LossOutputs:
        seen.append((inputs.ops.group.tolist(), inputs.ops.trajectory.tolist()))
        return toy_value(inputs)

    batch = ragged_batch()
    batch = batch.with_columns({"returns": np.zeros(batch.n_rows, np.float32)})
    empty = int((batch.segments.sequence_tokens == 0).sum())
    for unit, calls in (("group", 3), ("sequence", 9)):
        seen.clear()
        trainer = build_trainer(scalar, role="critic", losses={"value": LossTerm(looks, unit=unit)}, micro_batch_tokens=1)
        await trainer.step(batch)
        assert len(seen) == calls
        assert all(len(set(groups if unit == "group" else trajectories)) == 1 for groups, trajectories in seen)
        assert sum(len(groups) for groups, _ in seen) == len(batch) - empty


async def test_branches_stay_with_their_trajectory_in_pairs(scalar: Path):
    """A pair whose micro-batch lacked a half would have the loss of a single score."""
    batch = ragged_batch()
    pairs = batch.select(np.flatnonzero(batch.segments.trajectory % 3 != 2)).counted()
    pairs = pairs.with_steps([np.arange(len(pairs))])
    losses = {"pairs": LossTerm(toy_pairs, unit="pair")}
    reports = [await build_trainer(scalar, role="reward", losses=losses, micro_batch_tokens=n).step(pairs) for n in (1, 10_000)]
    assert reports[0].metrics["loss"] == pytest.approx(reports[1].metrics["loss"], rel=1e-5)
    assert reports[0].metrics["grad_norm"] == pytest.approx(reports[1].metrics["grad_norm"], rel=1e-5)


# Checkpoints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_critic_goes_on_to_the_bit(dense: Path, tmp_path: Path, dtype: str):
    """Two steps at once, or one, a fresh trainer and the other. A policy's checkpoint is not its own."""
    batch = ragged_batch()
    batch = batch.with_columns({"returns": np.ones(batch.n_rows, np.float32)})
    options: dict[str, Any] = dict(role="critic", losses={"value": toy_value}, dtype=dtype, lr=1e-2)
    straight, first, second = (build_trainer(dense, **options) for _ in range(3))
    for trainer in (straight, straight, first):
        await trainer.step(batch)
    await first.save(tmp_path / "critic")
    await second.load(tmp_path / "critic")
    await second.step(batch)
    assert same(weights(second), weights(straight)) and not same(weights(second), weights(first))

    await build_trainer(dense, dtype=dtype).save(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=r"lacks 'score\.weight': it belongs to another model"):
        await second.load(tmp_path / "policy")
