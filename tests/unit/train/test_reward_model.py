"""`reward: reward_model`: the scores of plain transformers, from the policy's tokens or from text, and what it refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fixtures.training import build_trainer, toy_pairs
from pydantic import ValidationError

from miles_core.batch import Batch
from miles_core.builder import SampleBuilder
from miles_core.errors import ConfigError, DataError
from miles_core.models import materialize
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext, LossTerm
from miles_core.refs import SampleRef
from miles_core.sample import Group, Sample, SampleId, Status
from miles_core.scoring import Scorer
from miles_core.tokenizers import TokenizerConfig, load_tokenizer

SIZES: dict[str, Any] = dict(
    model_type="qwen3", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    initializer_range=0.2, tie_word_embeddings=True,
)  # fmt: skip
WORDS = ("1", "2", "3", " + ", " = ", "yes", "no", " ")
QUESTIONS = ("1 + 2", "3 + 3", "2")
ANSWERS = ("yes", "no 1 = 1", "3 = 3 = 3 no no yes", "")


def policy(directory: Path, words: tuple[str, ...]) -> Path:
    return materialize(None, SIZES, TokenizerConfig(kind="words", words=words), (), directory, 0)


def judge(directory: Path, source: Path, seed: int = 0) -> Path:
    """A reward model with a random head, and the tokenizer of ``source``."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype="float32")
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(directory)
    load_tokenizer(source).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def same_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy, and a reward model with its vocabulary."""
    root = tmp_path_factory.mktemp("same")
    path = policy(root / "policy", WORDS)
    return path, judge(root / "judge", path)


@pytest.fixture(scope="module")
def other_words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy, and a reward model that writes the same texts with other ids."""
    root = tmp_path_factory.mktemp("other")
    return policy(root / "policy", WORDS), judge(root / "judge", policy(root / "base", WORDS[::-1]))


def sample(path: Path, question: str, answer: str, trajectory: int = 0, *, ended: bool = True, policy: str = "policy") -> Sample:
    tokenizer = load_tokenizer(path)
    builder = SampleBuilder(SampleId("test", policy, "p", "g", trajectory), tokenizer)  # ty: ignore[invalid-argument-type]
    builder.inject(question, role="user")
    builder.inject(answer, role="assistant")
    if ended:
        builder.inject_ids([tokenizer.eos_token_id], role="assistant")  # ty: ignore[invalid-argument-type]
    return builder.finish(Status.COMPLETED, prompt=question)


def group(path: Path) -> list[Sample]:
    pairs = [(q, a) for q in QUESTIONS for a in ANSWERS]
    return [sample(path, q, a, t, ended=t % 3 != 0) for t, (q, a) in enumerate(pairs)]


def plain_scores(path: Path, texts: list[str]) -> np.ndarray:
    """transformers' own output for each text, one at a time; with its tokenizer's end of text where the text ends in <eos>."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype="float32").eval()
    tokenizer = load_tokenizer(path)
    with torch.no_grad():
        return np.array([float(model(torch.tensor([tokenizer.encode(text)])).logits[0, 0]) for text in texts])


def built(path: Path, context_path: Path | None = None, **options: Any) -> Any:
    config = config_class("reward", "reward_model").model_validate({"use": "reward_model", "path": str(path), **options})
    tokenizer = None if context_path is None else load_tokenizer(context_path)
    return config.build(BuildContext(Path("nowhere"), "test", 0, model="policy", tokenizer=tokenizer))


def texts(samples: list[Sample]) -> list[str]:
    return [s.prompt + s.metadata["response"] for s in samples]


# Scores


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
def test_the_policys_tokens_are_read_where_they_mean_the_same(same_words: tuple[Path, Path], micro_batch_tokens: int):
    """Not the text: it is taken away."""
    path, judge = same_words
    samples = group(path)
    expected = plain_scores(judge, texts(samples))
    for s in samples:
        s.prompt, s.metadata = None, {}
    scores = built(judge, path, micro_batch_tokens=micro_batch_tokens)(samples)
    assert all(isinstance(score, float) for score in scores)
    assert expected.std() > 0.1
    np.testing.assert_allclose(scores, expected, atol=2e-5, rtol=0)


def test_text_is_read_where_the_vocabulary_is_another(other_words: tuple[Path, Path]):
    """Not the tokens: they would be other words."""
    path, judge = other_words
    samples = group(path)
    np.testing.assert_allclose(built(judge, path)(samples), plain_scores(judge, texts(samples)), atol=2e-5, rtol=0)
    as_tokens = Sample.of(samples[-1].id, samples[-1].tokens)
    assert load_tokenizer(judge).decode(as_tokens.tokens.tolist()) != texts(samples)[-1]


@pytest.mark.parametrize("policy, compared, reads_text", [("policy", True, False), ("other", True, True), ("policy", False, True)])
def test_text_is_read_where_nothing_is_known_of_the_vocabulary(
    same_words: tuple[Path, Path], policy: str, compared: bool, reads_text: bool
):
    """The samples' tokens and texts differ, so that it shows what was read: of another policy, or without a tokenizer, the text."""
    path, judge = same_words
    samples = [sample(path, q, a, policy=policy) for q in QUESTIONS for a in ANSWERS]
    expected = plain_scores(judge, texts(samples))
    for s in samples:
        s.columns["tokens"] = np.full_like(s.tokens, 3)
    scores = built(judge, path if compared else None)(samples)
    assert np.allclose(scores, expected, atol=2e-5) == reads_text


def test_the_policys_end_of_text_becomes_the_reward_models(same_words: tuple[Path, Path]):
    """As letters it would be unknown to the reward model, or be read as words. Only at the very end."""
    path, judge = same_words
    tokenizer = SimpleNamespace(eos_token_id=7, decode=lambda ids: {7: "yes"}[ids[0]])
    context = BuildContext(Path("nowhere"), "test", 0, model="policy", tokenizer=tokenizer)
    config = config_class("reward", "reward_model").model_validate({"use": "reward_model", "path": str(judge)})
    samples = [sample(path, "1 + 2", "no yes", 0, ended=False), sample(path, "yes", "yes no", 1, ended=False)]
    expected = plain_scores(judge, ["1 + 2no <eos>", "yesyes no"])
    np.testing.assert_allclose(config.build(context)(samples), expected, atol=2e-5, rtol=0)


def test_a_policy_may_end_its_text_with_any_of_the_ids_that_its_model_declares(same_words: tuple[Path, Path], tmp_path: Path):
    path, judge = same_words
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8]}')
    tokenizer = SimpleNamespace(eos_token_id=7, decode=lambda ids: {7: "yes", 8: "no"}[ids[0]])
    context = BuildContext(Path("nowhere"), "test", 0, model="policy", tokenizer=tokenizer, model_path=tmp_path)
    config = config_class("reward", "reward_model").model_validate({"use": "reward_model", "path": str(judge)})
    samples = [sample(path, "1 + 2", "no yes", 0, ended=False), sample(path, "yes", "yes no", 1, ended=False)]
    expected = plain_scores(judge, ["1 + 2no <eos>", "yesyes <eos>"])
    np.testing.assert_allclose(config.build(context)(samples), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000])
def test_a_score_has_the_same_bits_in_any_company(same_words: tuple[Path, Path], micro_batch_tokens: int):
    """``numerics: bitwise``: rewards do not depend on what else is scored with a sample."""
    path, judge = same_words
    said = {"use": "reward_model", "path": str(judge), "micro_batch_tokens": micro_batch_tokens}
    context = BuildContext(Path("nowhere"), "test", 0, model="policy", tokenizer=load_tokenizer(path), bitwise=True)
    score = config_class("reward", "reward_model").model_validate(said).build(context)
    samples = group(path)
    together = score(samples)
    assert together == [score([s])[0] for s in samples] == score(samples[::-1])[::-1]
    np.testing.assert_allclose(together, plain_scores(judge, texts(samples)), atol=2e-5, rtol=0)


async def test_scores_through_the_scorer(same_words: tuple[Path, Path]):
    """Several groups at once, each in a thread of its own; a trajectory's last sample speaks for it."""
    path, judge = same_words
    config = config_class("reward", "reward_model").model_validate({"use": "reward_model", "path": str(judge), "weight": 2.0})
    scorer = Scorer({"judge": config}, BuildContext(Path("nowhere"), "test", 0, model="policy", tokenizer=load_tokenizer(path)))
    groups = [Group(str(g), [s for s in group(path) if s.id.trajectory % 4 == g]) for g in range(4)]
    await asyncio.gather(*(scorer.score_group(g.samples) for g in groups))
    for g in groups:
        expected = plain_scores(judge, texts(g.samples))
        np.testing.assert_allclose([s.rewards["judge"] for s in g.samples], expected, atol=2e-5)
        np.testing.assert_allclose([s.reward for s in g.samples], 2 * expected, atol=4e-5)


async def test_a_model_that_a_stage_before_trained(same_words: tuple[Path, Path], tmp_path: Path):
    """Trained by `trainer: torch`, exported where the runner exports, found by its name."""
    path, _ = same_words
    samples = group(path)[:6]
    for s in samples:
        s.columns["loss_mask"][1:] = True
    pairs = [Sample(SampleId("test", "judge", "p", f"g{i // 2}", i % 2), s.columns) for i, s in enumerate(samples)]
    trainer = build_trainer(path, role="reward", losses={"pairs": LossTerm(toy_pairs, unit="pair")}, lr=1e-2)
    for _ in range(3):
        await trainer.step(Batch.of([SampleRef.of(s) for s in pairs]))
    await trainer.export(tmp_path / "models" / "rl" / "judge")

    config = config_class("reward", "reward_model").model_validate({"use": "reward_model", "model": "judge"})
    context = BuildContext(tmp_path, "test", 0, model="policy", tokenizer=load_tokenizer(path), stage_name="rl")
    batch = await trainer.annotate(Batch.of([SampleRef.of(s) for s in pairs]), frozenset({"values"}))
    scores = config.build(context)(samples)
    np.testing.assert_array_equal(np.array(scores, np.float32), batch.array("values")[batch.cu_seqlens[1:] - 1])
    assert np.ptp(scores) > 0.01

    with pytest.raises(ConfigError, match=r"no stage before 'rl' trained a model of that name \(trained: judge\)"):
        config_class("reward", "reward_model").model_validate({"use": "reward_model", "model": "jugde"}).build(context)


# What it refuses


@pytest.mark.parametrize("options", [{}, {"path": "x", "model": "judge"}])
def test_path_and_model_are_one_or_the_other(options: dict[str, str]):
    with pytest.raises(ValidationError, match="give either path"):
        config_class("reward", "reward_model").model_validate({"use": "reward_model", **options})


def test_a_model_that_was_never_trained_to_score_is_refused(same_words: tuple[Path, Path]):
    """A language model's head would be 0: every score the same."""
    with pytest.raises(ConfigError, match="gives 0 to everything: its head was never trained"):
        built(same_words[0])


def test_a_directory_without_model_or_tokenizer_is_refused(same_words: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(ConfigError, match="neither a directory nor a hub id"):
        built(tmp_path / "no" / "where")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((same_words[1] / name).read_bytes())
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        built(tmp_path)


@pytest.mark.parametrize("token", [len(WORDS) + 2, -1])
def test_a_token_outside_the_vocabulary_names_its_sample(same_words: tuple[Path, Path], token: int):
    path, judge = same_words
    samples = group(path)
    samples[4].tokens[1] = token
    with pytest.raises(DataError, match=rf"sample {samples[4].id} holds token id {token}; the reward model's ids are 0 to 9"):
        built(judge, path)(samples)


def test_a_text_that_its_tokenizer_cannot_write_names_its_sample(other_words: tuple[Path, Path]):
    path, judge = other_words
    samples = group(path)
    samples[2].metadata["response"] = "maybe"
    with pytest.raises(DataError, match=rf"sample {samples[2].id}: the reward model's tokenizer cannot write '1 \+ 2maybe'"):
        built(judge, path)(samples)


@pytest.mark.parametrize(
    "prompt, metadata, lacks", [("1", {}, "metadata has no response"), (["1"], {"response": "2"}, "its prompt is no text")]
)
def test_without_text_another_vocabulary_cannot_be_read(other_words: tuple[Path, Path], prompt: Any, metadata: dict, lacks: str):
    path, judge = other_words
    odd = Sample.of(SampleId("test", "policy", "p", "g"), [1, 2], prompt=prompt, metadata=metadata)
    with pytest.raises(DataError, match=rf"sample {odd.id}: .*another vocabulary.*{lacks}"):
        built(judge, path)([odd])


def test_nothing_to_read_is_refused(other_words: tuple[Path, Path]):
    path, judge = other_words
    odd = Sample.of(SampleId("test", "policy", "p", "g"), [1], prompt="", metadata={"response": ""})
    with pytest.raises(DataError, match=rf"sample {odd.id} has no token"):
        built(judge, path)([odd])
