"""Reading a run: facts without the data, what is meant by a filter, groups, tokens, and nothing that commands a terminal."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from fixtures.samples import HARD_CASES, answer, ragged, random_samples, sample_id, tool_turn, two_branches
from rich.console import Console

from miles_core.cli.inspect import Seen, show_list, show_one
from miles_core.columns import COLUMNS, ColumnSpec, register_column
from miles_core.errors import ConfigError, DataError
from miles_core.inspection.facts import files_of_steps, prompt_text, sample_at, trajectory_files
from miles_core.inspection.groups import grouped
from miles_core.inspection.selection import Range, Selection
from miles_core.inspection.terminal import group_listing, listing, one_line, visible, whole
from miles_core.inspection.tokens import Vocabulary, intensities, quantities, stretches, tokenizer_directory
from miles_core.run_dir import RunDir
from miles_core.sample_io import save_samples
from miles_core.tokenizers import TokenizerConfig, build_tokenizer


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir.create(tmp_path, "mini")
    run.config.write_text("name: mini\n")
    return run


def write(run: RunDir, name: str, samples: list) -> Path:
    path = run.trajectories / f"{name}.safetensors"
    save_samples(path, samples)
    return path


@pytest.mark.parametrize("seed", range(4))
def test_facts_are_those_of_the_samples(run, seed):
    samples = random_samples(seed) if seed else [s for case in HARD_CASES.values() for s in case()]
    write(run, "step-000007", samples)
    [file] = trajectory_files(run)
    facts = file.facts()
    assert len(facts) == len(samples)
    for number, (f, s) in enumerate(zip(facts, samples, strict=True)):
        sampled = s.versions[s.versions >= 0]
        assert (f.address, f.step, f.source) == (f"7:{number}", 7, "(train)")
        assert (f.policy, f.prompt_id, f.group) == (s.id.policy, s.id.prompt, s.id.group)
        assert (f.trajectory, f.branch, f.attempt) == (s.id.trajectory, s.id.branch, s.id.attempt)
        assert (f.reward, f.rewards, f.status, f.turns) == (s.reward, s.rewards, s.status.value, len(s.turns))
        assert (f.length, f.sampled, f.trained) == (len(s.tokens), len(sampled), np.count_nonzero(s.loss_mask))
        assert (f.oldest, f.newest) == ((min(sampled), max(sampled)) if len(sampled) else (-1, -1))
        assert sample_at(run, f.address)[1].id == s.id


def test_files_are_in_order_and_others_are_none_of_ours(run):
    for name in ("step-000010", "eval-held-out-000002", "step-000002", "eval-a-000010"):
        write(run, name, tool_turn())
    (run.trajectories / "step-000011.safetensors.partial").touch()
    (run.trajectories / "notes.safetensors").touch()
    assert [(f.step, f.source, f.address(3)) for f in trajectory_files(run)] == [
        (2, "(train)", "2:3"),
        (2, "held-out", "held-out@2:3"),
        (10, "(train)", "10:3"),
        (10, "a", "a@10:3"),
    ]
    assert [f.step for f in files_of_steps(run, Range(3, 10))] == [10, 10]


def test_a_list_reads_no_token_and_a_trajectory_in_full_notices_damage(run):
    path = write(run, "step-000001", ragged())
    good = trajectory_files(run)[0].facts()
    tokens = ragged()[0].tokens.tobytes()
    content = path.read_bytes()
    assert content.count(tokens) == 1
    path.write_bytes(content.replace(tokens, bytes(len(tokens))))
    assert trajectory_files(run)[0].facts() == good
    with pytest.raises(DataError, match=r"step-000001\.safetensors: damaged"):
        sample_at(run, "1:0")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content[: len(content) // 2], "Is it complete"),
        (lambda content: b"", "cannot be read as samples"),
        (lambda content: content.replace(b"miles-samples-1", b"miles-samples-2"), "'miles-samples-2', expected 'miles-samples-1'"),
        (lambda content: content.replace(b'[{"prompt"', b'[["prompt"'), "its list of samples cannot be read"),
    ],
)
def test_a_damaged_file_is_named(run, spoil, said):
    path = write(run, "step-000001", tool_turn())
    content = path.read_bytes()
    assert spoil(content) != content
    path.write_bytes(spoil(content))
    with pytest.raises(DataError) as error:
        trajectory_files(run)[0].facts()
    assert said in str(error.value) and "step-000001.safetensors" in str(error.value)


def test_what_is_not_there_is_a_sentence(run):
    with pytest.raises(ConfigError, match=r"mini has no trajectories yet \(0 rows of metrics\)"):
        files_of_steps(run)
    for step in (*range(1, 12), 40):
        write(run, f"step-{step:06d}", tool_turn())
    with pytest.raises(ConfigError, match=r"no trajectories of that step. It has those of 12 steps from 1 to 40"):
        files_of_steps(run, Range(20, 30))
    for address, said in {
        "x": "STEP:NUMBER",
        "20:0": "that step",
        "3:1": "those of step 3 are 3:0 to 3:0",
        "held_out@3:0": "no trajectories of 'held_out' at step 3, only of (train)",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            sample_at(run, address)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("3", [3], [2.9, 4]),
        ("0..0.5", [0, 0.25, 0.5], [-0.1, 0.51]),
        ("..-1", [-5, -1], [0]),
        ("1..", [1, 1e9], [0.9]),
        ("-1..-0.5", [-1], [0]),
    ],
)
def test_ranges(text, inside, outside):
    asked = Range.parse(text, "--reward")
    assert asked is not None and all(x in asked for x in inside) and not any(x in asked for x in outside)


@pytest.mark.parametrize("text", ["", "..", "a", "1..b", "2..1", "1..2..3", "nan"])
def test_what_is_no_range_is_a_sentence(text):
    with pytest.raises(ConfigError, match=r"--step .*expected a number, or a range"):
        Range.parse(text, "--step")


def test_a_selection_holds_by_reward_and_by_prompt(run):
    samples = [
        replace(answer(sample_id(0), [5], [1], reward=0.0), prompt="What is Seven?"),
        replace(answer(sample_id(1, group="g1"), [5], [1], reward=0.5), prompt=[{"role": "user", "content": "seven?"}]),
        replace(answer(sample_id(2), [5], [1]), prompt="eight"),
    ]
    write(run, "step-000001", samples)
    facts = trajectory_files(run)[0].facts()

    def held(**asked) -> list[str]:
        return [f.address for f in facts if Selection(**asked).holds(f)]

    assert held() == ["1:0", "1:1", "1:2"]
    assert held(rewards=Range(0, 0.5)) == ["1:0", "1:1"]  # one without a reward is in no range
    assert held(prompt="SEVEN") == ["1:0", "1:1"]
    assert held(prompt="prompt-g1") == ["1:1"] and held(prompt="prompt-") == []  # an id is meant whole
    assert prompt_text({"a": "ü"}) == '{"a": "ü"}' and prompt_text(None) == ""


def test_an_evaluator_called_train_is_told_from_training(run):
    write(run, "step-000003", tool_turn())
    write(run, "eval-train-000003", two_branches())
    assert [f.address for file in trajectory_files(run) for f in file.facts()] == ["3:0", "train@3:0", "train@3:1"]
    assert sample_at(run, "3:0")[1].id == tool_turn()[0].id and sample_at(run, "train@3:1")[1].id == two_branches()[1].id


def test_a_filter_chooses_groups_and_their_numbers_are_those_of_all_members(run):
    rewards = {"g0": [1.0, 0.0, 0.0, 1.0], "g1": [0.0, 0.0, 0.0, 0.0], "g2": [0.0, 0.0, 0.0, 1.0]}
    write(run, "step-000001", [answer(sample_id(t, group=g), [5], [1], reward=r) for g, of in rewards.items() for t, r in enumerate(of)])
    seen = Seen(Selection(rewards=Range(1, 1)), files_of_steps(run), whole_groups=True)
    found = {g.group: (g.size, g.mean, g.least, g.most, g.std) for g in grouped(seen)}
    assert found == {g: (4, np.mean(rewards[g]), 0.0, 1.0, np.std(rewards[g])) for g in ("g0", "g2")}
    assert (seen.matching, seen.total) == (3, 12)
    assert [f.reward for f in Seen(seen.selection, seen.files, whole_groups=False)] == [1.0] * 3  # a list has the matching ones only


def test_what_a_filter_is_called_is_read_as_the_same_filter():
    for asked in (Range(0, 0.5), Range(high=0), Range(low=-1.25), Range(3, 3)):
        assert Range.parse(str(asked), "--reward") == asked


def test_what_is_printed_for_machines_has_no_nan(run, capsys):
    [sample] = tool_turn()
    sample.label, sample.metadata["scores"] = {"best": math.inf}, [1.5, math.nan, (-math.inf, "NaN", None)]
    sample.reward = math.nan
    write(run, "step-000001", [sample])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    show_one(run, "1:0", "logprobs", True)
    said = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert said["label"] == {"best": None} and said["metadata"]["scores"] == [1.5, None, [None, "NaN", None]] and said["reward"] is None
    assert said["columns"]["logprobs"] == [None if math.isnan(v) else float(v) for v in sample.logprobs]
    show_list(run, Selection(), 40, False, True)
    show_list(run, Selection(), 40, True, True)
    one, group = (json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines())
    assert one["reward"] is None and group["mean"] is None


def test_a_file_that_was_written_anew_meanwhile_is_named(run):
    write(run, "step-000001", two_branches())
    [file] = trajectory_files(run)
    listed = file.facts()
    assert [s.id for s in file.samples(listed[::-1])] == [s.id for s in two_branches()[::-1]]
    for other in (two_branches()[:1], two_branches()[::-1]):  # fewer samples; as many, but others
        write(run, "step-000001", other)
        with pytest.raises(DataError, match=r"step-000001\.safetensors: another file now than when it was listed: 1:"):
            file.samples(listed)


def test_an_unfinished_export_gives_no_tokenizer(run):
    tokenizer = build_tokenizer(TokenizerConfig(kind="words", words=("a",)), ["a"])
    tokenizer.save_pretrained(run.models / "final.partial" / "policy")
    assert tokenizer_directory(run, "policy") is None
    tokenizer.save_pretrained(run.models / "rl" / "policy")
    assert tokenizer_directory(run, "policy") == run.models / "rl" / "policy"


def test_in_a_group_a_trajectory_counts_once(run):
    write(run, "step-000001", [*two_branches(), answer(sample_id(1), [5], [1], reward=0.0), answer(sample_id(0, group="g1"), [5], [1])])
    first, second = grouped(trajectory_files(run)[0].facts())
    assert (first.size, first.mean, first.least, first.most, first.std) == (2, 0.5, 0.0, 1.0, 0.5)  # rewards 1, 1 (branches), 0
    assert (first.first, first.statuses) == ("1:0", {"completed": 3})
    assert (second.first, second.mean, second.std) == ("1:3", None, None)


def test_the_ratio_is_the_trainers_probability_over_the_rollouts():
    [sample] = tool_turn()
    assert "ratio" not in quantities(sample)
    sample.columns["old_logprobs"] = np.where(sample.versions >= 0, -0.5, np.nan).astype(np.float32)
    ratio = quantities(sample)["ratio"]
    expected = [np.nan, np.nan, np.exp(-0.4), np.exp(0.7), np.exp(-0.5), np.nan, np.nan, np.exp(-0.2), np.exp(-0.5)]
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)


def test_colours_are_full_where_they_should_be():
    trained = np.array([False, True, True, True])
    logprobs = np.array([np.nan, 0, -2.5, -9], np.float32)
    np.testing.assert_allclose(intensities("logprobs", logprobs, trained), [0, 0, 0.5, 1])
    advantages = np.array([7, 1, -2, 0], np.float32)  # the untrained 7 neither is coloured nor sets the scale
    np.testing.assert_allclose(intensities("advantages", advantages, trained), [0, 0.5, -1, 0])
    np.testing.assert_allclose(intensities("ratio", np.array([2, 1.1, 0.5, 1]), trained), [0, 0.5, -1, 0])
    assert intensities("loss_mask", trained, trained).tolist() == [0, 1, 1, 1]
    np.testing.assert_allclose(intensities("versions", np.array([-1, 7, 5, 6], np.int32), trained), [0, 0.25, 1, 0.625])
    assert not intensities("advantages", np.full(4, np.nan, np.float32), trained).any()


def test_a_column_that_is_declared_is_shown_and_nothing_else_is_edited():
    try:
        register_column(ColumnSpec("surprise", "token", ("float32",), 0.0, doc="a plug-in's"))
        [sample] = tool_turn()
        sample.columns["surprise"] = np.arange(9, dtype=np.float32)
        assert list(quantities(sample)) == ["versions", "loss_mask", "logprobs", "surprise"]
    finally:
        COLUMNS.pop("surprise")


def test_turns_and_what_lies_between():
    [sample] = tool_turn()
    assert [(s.role, s.start, s.end, s.kind) for s in stretches(sample)] == [
        ("user", 0, 2, "prompt"),
        ("assistant", 2, 5, "sampled"),
        ("tool", 5, 7, "injected"),
        ("assistant", 7, 9, "sampled"),
    ]
    sample.turns = sample.turns[1:2]
    assert [(s.role, s.start, s.end) for s in stretches(sample)] == [("", 0, 2), ("assistant", 2, 5), ("", 5, 9)]


def test_texts_of_tokens_are_the_tokenizers(run):
    assert Vocabulary(run, "policy").texts([1]) is None
    assert "no tokenizer of 'policy'" in (Vocabulary(run, "policy").lacking or "")
    text = "a word é <call>\n"
    tokenizer = build_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300, special_tokens=("<call>",)), [text] * 3)
    tokenizer.save_pretrained(run.models / "rl" / "policy")
    ids = tokenizer.encode(text)
    texts = Vocabulary(run, "policy").texts(ids)
    assert texts == [tokenizer.decode([i]) for i in ids] and "<call>" in texts


def test_a_prompt_is_no_markup_and_a_line_stays_a_line(run):
    samples = [
        replace(
            answer(sample_id(group="[/b]" * 9), [5], [1], reward=0.0), prompt="[bold][/x] " + "long " * 30, rewards={"[a]": 1.0, "b": 2.0}
        )
    ]
    write(run, "step-000001", samples)
    facts = trajectory_files(run)[0].facts()
    for width in (60, 250):
        console = Console(width=width, file=StringIO())
        console.print(listing(facts))
        console.print(group_listing(grouped(facts)))
        said = console.file.getvalue().splitlines()
        assert len(said) == 4 and "1:0" in said[1] and "1:0" in said[3]
    assert "[bold][/x] long" in said[1] and "[/b][/b]" in said[3]


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_a_list_fits_its_terminal_and_keeps_the_addresses(run, width):
    """Whole columns are left out, the less needed first; an address that is cut could not be asked for."""
    rewards = {"environment": 1.0, "frugal": -0.25}
    samples = [replace(answer(sample_id(group="g" * 30), [5], [1], reward=0.75), prompt="a long question " * 3, rewards=rewards)]
    write(run, "eval-rl.held_out-000170", samples)
    facts = trajectory_files(run)[0].facts()
    for table in (listing(facts, width), group_listing(grouped(facts), width)):
        console = Console(width=width, file=StringIO())
        console.print(table)
        head, line = console.file.getvalue().splitlines()
        assert "rl.held_out@170:0" in line and "prompt" in head and "reward" in head and "0.75" in line
        assert head.split() == [c.header for c in table.columns]  # none is cut off at the right
    assert ("version" in [c.header for c in listing(facts, width).columns]) == (width >= 100)


def test_nothing_of_a_model_can_command_a_terminal():
    hostile = "\x1b[2J\x1b]0;owned\x07 a\u202eb\u200b\x9b1m\n"
    shown = visible(hostile)
    assert shown == "⟨1b⟩[2J⟨1b⟩]0;owned⟨7⟩ a⟨202e⟩b⟨200b⟩⟨9b⟩1m\n"
    assert one_line("x" * 100, 10) == "x" * 9 + "…" and one_line(" a \n b ") == "a b"


@pytest.mark.parametrize(("advantage", "old", "said"), [(0.0, np.nan, True), (0.0, -0.3, False), (0.5, np.nan, False)])
def test_a_ratio_that_nobody_computed_says_why(run, advantage, old, said):
    """A step is taken without samples whose advantage is 0, so the trainer never saw their tokens."""
    columns = {"advantages": np.full(4, advantage, np.float32), "old_logprobs": np.full(4, old, np.float32)}
    sample = answer(sample_id(), [5, 6], [7, 8], version=1, reward=1.0)
    sample.columns.update(columns)
    write(run, "step-000001", [sample])
    facts, read = sample_at(run, "1:0")
    console = Console(width=400, record=True, file=StringIO())
    console.print(whole(facts, read, "ratio", None))
    text = console.export_text()
    assert ("its advantage is 0, so the step was taken without it" in text) == said
    assert ("nothing recorded" in text) == np.isnan(old)
