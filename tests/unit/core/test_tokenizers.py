"""Tokenizers from scratch: exact, deterministic, and cut where environments inject."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.gsm8k import gsm8k, gsm8k_directory
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from miles_core.errors import ConfigError, DataError
from miles_core.tokenizers import TokenizerConfig, build_tokenizer, load_tokenizer

WORDS = TokenizerConfig(kind="words", words=(*"0123456789", " + ", " +", " ?", " <call> ", "-"))
MARKS = ("<<", ">>", "=", "####")
BPE = TokenizerConfig(kind="bpe", vocab_size=400, special_tokens=MARKS)
TEXTS = ["Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24", "It's 1,080 – or £3… naïve\u2028\n\n  end "] * 5


@pytest.fixture(scope="module")
def bpe():
    return build_tokenizer(BPE, TEXTS)


def test_words_are_exact_texts_and_the_longest_wins() -> None:
    tokenizer = build_tokenizer(WORDS, ["47 + 5 ? <call> -1 +"])
    ids = tokenizer.encode("47 + 5 ? <call> -1 +<eos>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["4", "7", " + ", "5", " ?", " <call> ", "-", "1", " +", "<eos>"]
    assert len(tokenizer) == len(WORDS.words) + 2
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id


@given(st.lists(st.sampled_from([*"0123456789", " + ", " ?", " <call> ", "-", "<eos>"]), max_size=30))
def test_words_decode_to_the_very_text(words: list[str]) -> None:
    tokenizer = words_tokenizer()
    text = "".join(words)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def words_tokenizer(made=[]):  # noqa: B006  built once: hypothesis takes no fixtures of narrower scope
    if not made:
        made.append(build_tokenizer(WORDS, []))
    return made[0]


def test_words_refuse_what_they_cannot_write() -> None:
    with pytest.raises(DataError, match=r"no word of the tokenizer writes '\*' in '4 \* 7'"):
        build_tokenizer(TokenizerConfig(kind="words", words=(*"47", " ")), ["4 7", "4 * 7"])
    with pytest.raises(Exception, match="UNK"):
        words_tokenizer().encode("4 * 7")


def test_bpe_decodes_to_the_very_text(bpe) -> None:
    for text in (*TEXTS, "日本語 <|im_end|> \x00\t 0½", ""):
        assert bpe.decode(bpe.encode(text)) == text


def test_bpe_digits_and_special_tokens_stand_alone(bpe) -> None:
    tokens = bpe.convert_ids_to_tokens(bpe.encode("a =<<480/2=240>>240##### 240"))
    assert [t for t in tokens if any(mark in t for mark in MARKS)] == ["=", "<<", "=", ">>", "####"]
    assert all(len(t) == 1 for t in tokens if any(c.isdigit() for c in t))


def test_bpe_has_the_size_that_was_asked_for() -> None:
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnprst"]
    assert len(build_tokenizer(BPE, words)) == 400


def test_bpe_needs_texts() -> None:
    with pytest.raises(DataError, match="there are none"):
        build_tokenizer(BPE, [])


def test_a_saved_tokenizer_comes_back_whatever_the_model_beside_it(bpe, tmp_path: Path) -> None:
    """AutoTokenizer looks at config.json's model_type first; qwen2 has a tokenizer class of its own, which must not be taken."""
    for name, tokenizer, text in (("bpe", bpe, TEXTS[0]), ("words", words_tokenizer(), "47 + 5 ?<eos>")):
        tokenizer.save_pretrained(tmp_path / name)
        for model_type in ("qwen3", "qwen2"):
            (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
            loaded = load_tokenizer(tmp_path / name)
            assert loaded.encode(text) == tokenizer.encode(text) and loaded.decode(loaded.encode(text)) == text
            assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
                len(tokenizer),
            )


def test_a_missing_tokenizer_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "words"}, "needs its list of words"),
        ({"kind": "words", "words": ["a"], "vocab_size": 9}, "has no vocab_size"),
        ({"kind": "bpe", "words": ["a"]}, "has no words"),
        ({"kind": "words", "words": ["a", "a"]}, "listed twice"),
        ({"kind": "words", "words": [""]}, "is empty"),
        ({"kind": "words", "words": ["<eos>"]}, "always there"),
        ({"kind": "bpe", "vocab_size": 261, "special_tokens": ["<<", ">>", "#", "|"]}, "262"),
        ({"kind": "chars"}, "'words' or 'bpe'"),
        ({"kind": "bpe", "vocabsize": 300}, "vocabsize"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(options: dict, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        TokenizerConfig(**options)


# ---- over all of GSM8K ----------------------------------------------------------------------------------------------

GSM8K_BPE = TokenizerConfig(kind="bpe", vocab_size=4096, special_tokens=MARKS)
TRAIN = """
import hashlib, json, sys
from pathlib import Path
from fixtures.gsm8k import gsm8k
from miles_core.tokenizers import TokenizerConfig, build_tokenizer
texts = (p.text + "".join(q.text for q in p.demonstration) for s in ("train", "test") for p in gsm8k(s))
tokenizer = build_tokenizer(TokenizerConfig.model_validate_json(sys.argv[1]), texts)
print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
"""


def texts(prompts):
    return (p.text + "".join(q.text for q in p.demonstration) for p in prompts)


@pytest.fixture(scope="module")
def gsm8k_bpe():
    return build_tokenizer(GSM8K_BPE, texts([*gsm8k("train"), *gsm8k("test")]))


def assert_seamless(tokenizer, prompts) -> None:
    """Prompt, what the policy writes and what the environment injects are encoded apart in a run; the model must not see the seams."""
    for prompt in prompts:
        pieces = [prompt.text, *(p.text for p in prompt.demonstration)]
        apart = [tokenizer.encode(piece) for piece in pieces]
        joined = tokenizer.encode("".join(pieces))
        assert [i for ids in apart for i in ids] == joined, prompt.id
        assert tokenizer.decode(joined) == "".join(pieces)


def test_gsm8k_may_be_encoded_piece_by_piece() -> None:
    some = list(gsm8k("test", subset={"size": 300}))
    assert_seamless(build_tokenizer(GSM8K_BPE, texts(some)), some)


@pytest.mark.slow
def test_every_gsm8k_row_may_be_encoded_piece_by_piece(gsm8k_bpe) -> None:
    assert len(gsm8k_bpe) == 4096
    assert_seamless(gsm8k_bpe, [*gsm8k("train"), *gsm8k("test")])


@pytest.mark.slow
def test_gsm8k_stop_texts_end_on_a_token(gsm8k_bpe) -> None:
    """An engine that stops behind the token in which "=" appears has sampled nothing beyond it."""
    vocabulary = gsm8k_bpe.get_vocab()
    assert [token for token in vocabulary if "=" in token] == ["="]
    assert sorted(token for token in vocabulary if any(c.isdigit() and c.isascii() for c in token)) == list("0123456789")


@pytest.mark.slow
def test_gsm8k_training_is_deterministic(gsm8k_bpe) -> None:
    """In processes of their own, with other hash seeds and thread counts."""
    import hashlib

    found = {hashlib.sha256(gsm8k_bpe.backend_tokenizer.to_str().encode()).hexdigest()}
    tests = str(Path(__file__).parents[2])
    for seed, threads in (("1", "1"), ("2", "2")):
        environment = {
            "PYTHONPATH": tests,
            "PYTHONHASHSEED": seed,
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "true",
            "PATH": "",
            "MILES_GSM8K": str(gsm8k_directory()),
        }
        command = [sys.executable, "-c", TRAIN, GSM8K_BPE.model_dump_json(exclude_unset=True)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, bpe, nested: bool) -> None:
    """Its ids must be rows of the model's matrix, which may have more. An added token that it lacks is no reason to refuse (Gemma 3)."""

    def load(vocab_size: int):
        config = {"vocab_size": vocab_size}
        (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
        return load_tokenizer(tmp_path)

    bpe.save_pretrained(tmp_path)
    of_text = max(id for id in bpe.get_vocab().values() if id not in bpe.added_tokens_decoder)
    assert of_text < len(bpe) - 1
    for enough in (len(bpe) + 100, len(bpe), of_text + 1):
        assert len(load(enough)) == len(bpe)
    with pytest.raises(
        ConfigError, match=rf"does not match the model: its token '.*' has id {of_text}, but config.json says vocab_size {of_text}"
    ):
        load(of_text)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "{", "config.json cannot be read as JSON: "),
        ("config.json", "[]", "config.json holds a list; expected a JSON object"),
        ("tokenizer_config.json", '{"tokenizer_class": ', "tokenizer_config.json cannot be read as JSON: "),
    ],
)
def test_a_broken_description_is_a_sentence(tmp_path: Path, bpe, name: str, text: str, said: str) -> None:
    bpe.save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path}/{said}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_added_tokens_only_is_refused(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([AddedToken("a"), AddedToken("b")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 2, "text_config": null}')
    with pytest.raises(ConfigError, match=f"the tokenizer in {tmp_path} has no tokens but added ones"):
        load_tokenizer(tmp_path)
