"""The page, read by another program than its own: what is stored is what was recorded, and nothing of it can run or be fetched."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fixtures.samples import HARD_CASES, answer, random_samples, sample_id, tool_turn, two_branches

from miles_core.errors import ConfigError, MilesError, RunError
from miles_core.inspection.facts import Facts, trajectory_files
from miles_core.inspection.page import chosen_blocks, write_page
from miles_core.inspection.tokens import quantities
from miles_core.run_dir import RunDir
from miles_core.sample import Sample
from miles_core.sample_io import save_samples
from miles_core.tokenizers import TokenizerConfig, build_tokenizer

HOSTILE = "</script><img src=x onerror=alert(1)> \u202e<b>"


class Page(HTMLParser):
    """The elements of a page with their attributes and text."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict, str]] = [("", {}, "")]
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), ""))

    def handle_endtag(self, tag):
        self.elements.append(("", {}, ""))  # what follows belongs to no element that is looked at

    def handle_data(self, data):
        tag, attributes, text = self.elements[-1]
        self.elements[-1] = (tag, attributes, text + data)

    def data(self, id: str) -> bytes:
        [text] = [text for _, attributes, text in self.elements if attributes.get("id") == id]
        return gzip.decompress(base64.b64decode(text))

    def index(self) -> dict:
        return json.loads(self.data("index"))

    def block(self, number: int) -> tuple[list[dict], dict[str, dict[int, np.ndarray]]]:
        """Samples of a block, and by column the values of each sample that has it."""
        data = self.data(f"b{number}")
        size = int.from_bytes(data[:4], "little")
        header, at = json.loads(data[4 : 4 + size]), 4 + size
        lengths = [s["length"] for s in header["samples"]]
        columns = {}
        for name, dtype, count, has in header["arrays"]:
            values = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), count, at)
            at += -(-values.nbytes // 4) * 4
            bounds = np.cumsum([0] + [lengths[s] for s in has])
            columns[name] = {s: values[bounds[i] : bounds[i + 1]] for i, s in enumerate(has)}
        assert at == len(data)
        return header["samples"], columns


def unexpected(error: MilesError) -> None:
    raise error


def page_of(tmp_path: Path, files: dict[str, list[Sample]], budget: int = 10**6, tokenizer=None) -> Page:
    run = RunDir.create(tmp_path, "mini")
    run.config.write_text("name: mini\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(run.models / "rl" / "policy")
    for name, samples in files.items():
        save_samples(run.trajectories / f"{name}.safetensors", samples)
    found = trajectory_files(run)
    write_page(run, [f for file in found for f in file.facts()], found, tmp_path / "page.html", budget, unexpected)
    return Page(tmp_path / "page.html")


def with_columns(samples: list[Sample], seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    for s in samples[::2]:
        s.columns["old_logprobs"] = (s.logprobs + rng.normal(0, 1e-5, len(s))).astype(np.float32)
        s.columns["advantages"] = rng.normal(size=len(s)).astype(np.float32)
    return samples


@pytest.mark.parametrize("seed", range(3))
def test_a_page_holds_what_was_recorded(tmp_path, seed):
    hard = [s for case in HARD_CASES.values() for s in case()]
    files = {"step-000001": with_columns(hard if seed == 0 else random_samples(seed), seed), "eval-x-000001": random_samples(10 + seed)}
    page = page_of(tmp_path, files)
    index = page.index()
    columns, tables = index["columns"], index["tables"]
    samples = [s for of_file in files.values() for s in of_file]
    assert len(columns["step"]) == len(samples)
    for row, sample in enumerate(samples):
        said = {name: tables[name][columns[name][row]] for name in tables}
        assert (said["policy"], said["group"], said["prompt_id"], said["status"]) == (
            sample.id.policy,
            sample.id.group,
            sample.id.prompt,
            sample.status.value,
        )
        assert (columns["reward"][row], columns["length"][row], columns["sampled"][row]) == (sample.reward, len(sample), sample.n_sampled)
        stored, values = page.block(columns["block"][row])
        place = columns["within"][row]
        assert stored[place]["id"] == str(sample.id) and stored[place]["length"] == len(sample)
        wanted = quantities(sample) | {"tokens": sample.tokens}
        assert {name for name, of in values.items() if place in of} == set(wanted)
        for name, expected in wanted.items():
            found = values[name][place]
            if name == "ratio":  # its logarithm, so that what lies near 1 keeps its digits
                found, expected = found.astype(np.float64), sample.columns["old_logprobs"].astype(np.float64) - sample.logprobs
            np.testing.assert_allclose(found, expected, rtol=2e-4 if expected.dtype.kind == "f" else 0)
            assert name in index["quantities"] or name == "tokens"


def test_a_page_may_fetch_nothing_and_run_nothing_but_its_own_script(tmp_path):
    words = [HOSTILE, "a"]
    tokenizer = build_tokenizer(TokenizerConfig(kind="words", words=tuple(words)), words)
    sample = answer(sample_id(group=HOSTILE), tokenizer.encode(HOSTILE), tokenizer.encode("a"), reward=1.0, label=HOSTILE)
    sample.prompt = HOSTILE
    sample.metadata["response"] = HOSTILE
    page = page_of(tmp_path, {"step-000001": [sample]}, tokenizer=tokenizer)
    text = (tmp_path / "page.html").read_text()
    assert "onerror" not in text and "http:" not in text and "https:" not in text and " src=" not in text and " href=" not in text
    assert HOSTILE in page.index()["vocabulary"]["policy"]["texts"] and HOSTILE in page.index()["tables"]["prompt"]  # it is there, packed
    [policy] = [a["content"] for t, a, _ in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        [own] = [x for t, a, x in page.elements if t == tag and a.get("type") != "application/gzip"]
        assert f"'sha256-{base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()}'" in policy
    assert re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text) == []


def facts_of(files: int, groups: int, size: int, length: int) -> list[Facts]:
    rest = dict(policy="p", prompt_id="", branch=0, attempt=0, prompt="", reward=None, rewards={}, status="", turns=1)
    numbers = dict(length=length, sampled=1, trained=1, oldest=0, newest=0)
    return [
        Facts(address=f"{s}:{g * size + t}", step=s, source="train", group=f"g{g}", trajectory=t, **rest, **numbers)
        for s in range(files)
        for g in range(groups)
        for t in range(size)
    ]


def test_the_budget_goes_to_whole_groups_evenly_over_the_run():
    facts = facts_of(files=100, groups=4, size=8, length=10)
    taken = chosen_blocks(facts, budget=80 * 20)  # of 400 groups, 20
    assert all(len(block) == 8 and len({(facts[r].step, facts[r].group) for r in block}) == 1 for block in taken)
    steps = [facts[block[0]].step for block in taken]
    assert len(taken) == len(set(steps)) == 20 and 99 in steps
    assert max(np.diff([0, *sorted(steps), 99])) <= 10
    assert len(chosen_blocks(facts, budget=10**9)) == 400 and chosen_blocks(facts, budget=79) == []


def test_a_page_over_its_budget_says_so_and_lists_everything(tmp_path):
    page = page_of(tmp_path, {f"step-{n:06d}": tool_turn() for n in range(1, 6)}, budget=2 * 9)
    assert sorted(page.index()["columns"]["block"]) == [-1, -1, -1, 0, 1] and len(page.index()["columns"]["step"]) == 5


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    run = RunDir.create(tmp_path, "mini")
    with pytest.raises(RunError, match="the page cannot be written"):
        write_page(run, [], [], tmp_path / "no" / "page.html", 0, unexpected)
    page = tmp_path / "page.html"
    assert "0 trajectories" in write_page(run, [], [], page, 0, unexpected) and Page(page).index()["columns"]["step"] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mini", "page.html"]


def test_a_page_has_no_nan(tmp_path):
    [sample] = tool_turn()
    sample.label, sample.reward = [math.nan, "NaN", 1], math.inf
    page = page_of(tmp_path, {"step-000001": [sample]})
    [stored], _ = page.block(0)
    assert stored["label"] == [None, "NaN", 1] and page.index()["columns"]["reward"] == [None]


def test_an_evaluator_called_train_has_a_page_of_its_own_samples(tmp_path):
    page = page_of(tmp_path, {"step-000003": tool_turn(), "eval-train-000003": two_branches()})
    index = page.index()
    assert [index["tables"]["source"][s] for s in index["columns"]["source"]] == [index["train"], "train", "train"]
    stored = [page.block(b)[0][w]["id"] for b, w in zip(index["columns"]["block"], index["columns"]["within"], strict=True)]
    assert stored == [str(s.id) for s in [*tool_turn(), *two_branches()]]


def test_a_file_that_was_written_anew_meanwhile_is_passed_over(tmp_path):
    run = RunDir.create(tmp_path, "mini")
    run.config.write_text("name: mini\n")
    for name in ("step-000001", "step-000002"):
        save_samples(run.trajectories / f"{name}.safetensors", two_branches())
    files, told = trajectory_files(run), []
    listed = [f for file in files for f in file.facts()]
    save_samples(files[0].path, two_branches()[:1])
    assert "4 trajectories, 2 with their tokens" in write_page(run, listed, files, tmp_path / "page.html", 10**6, told.append)
    assert len(told) == 1 and "step-000001.safetensors: another file now" in str(told[0])
    index = Page(tmp_path / "page.html").index()
    assert [b < 0 for b in index["columns"]["block"]] == [True] * 2 + [False] * 2


def test_whatever_happens_nothing_half_written_is_left(tmp_path):
    run = RunDir.create(tmp_path, "mini")
    run.config.write_text("name: mini\n")
    save_samples(run.trajectories / "step-000001.safetensors", tool_turn())
    files = trajectory_files(run)
    listed = files[0].facts()

    def interrupted(error: MilesError) -> None:
        raise KeyboardInterrupt

    files[0].path.write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        write_page(run, listed, files, tmp_path / "page.html", 10**6, interrupted)
    for directory in (tmp_path, Path(".")):
        with pytest.raises(ConfigError, match="is a directory; --html names the page's file"):
            write_page(run, [], [], directory, 0, unexpected)
    assert [p.name for p in tmp_path.iterdir()] == ["mini"]


def shown_by(browser_page: Path, profile: Path) -> Page:
    """The page as Chromium has it after its scripts ran."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", browser_page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    browser_page.with_suffix(".shown").write_text(done.stdout)
    return Page(browser_page.with_suffix(".shown"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser_a_filter_chooses_groups_and_their_numbers_are_those_of_all_members(tmp_path):
    run = RunDir.create(tmp_path, "mini")
    rewards = {"g0": [1.0, 0.0, 0.0, 1.0], "g1": [0.0, 0.0, 0.0, 0.0], "g2": [0.0, 0.0, 0.0, 1.0]}
    samples = [answer(sample_id(t, group=g), [5], [1], reward=r) for g, of in rewards.items() for t, r in enumerate(of)]
    save_samples(run.trajectories / "step-000001.safetensors", samples)
    run.config.write_text("name: mini\n")
    files, page = trajectory_files(run), tmp_path / "page.html"
    write_page(run, files[0].facts(), files, page, 10**6, unexpected, rewards="1..")
    shown = shown_by(page, tmp_path / "profile")
    [count] = [text for _, a, text in shown.elements if a.get("id") == "count"]
    assert count.startswith("3 of 12 trajectories")  # as the command was asked

    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())  # the test's own script has no hash in it
    page.write_text(
        text.replace("</body>", "<script>begin().then(() => { form.elements.groups.checked = true; refresh(); });</script></body>")
    )
    shown = shown_by(page, tmp_path / "profile")
    [count] = [text for _, a, text in shown.elements if a.get("id") == "count"]
    assert count.startswith("2 groups with 3 of 12 trajectories")
    cells = [text for tag, _, text in shown.elements if tag == "span"]
    lines = [cells[i : i + 10] for i in range(0, len(cells), 10)]
    assert [(line[2], line[3], line[5], line[7], line[8]) for line in lines] == [
        ("g0", "0.5", "4", "0", "1"),
        ("g2", "0.25", "4", "0", "1"),
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_a_trajectory_as_text(tmp_path):
    words = [HOSTILE, "a"]
    tokenizer = build_tokenizer(TokenizerConfig(kind="words", words=tuple(words)), words)
    sample = answer(sample_id(group=HOSTILE), tokenizer.encode(HOSTILE), tokenizer.encode("a"), reward=1.0, label=HOSTILE)
    sample.prompt = HOSTILE
    page_of(tmp_path, {"step-000001": [sample]}, tokenizer=tokenizer)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", f"{(tmp_path / 'page.html').as_uri()}#1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (tmp_path / "shown.html").write_text(done.stdout)
    shown = Page(tmp_path / "shown.html")
    assert not [t for t, _, _ in shown.elements if t in ("img", "b")]
    tokens = [(a.get("data-t"), text) for _, a, text in shown.elements if "data-t" in a]
    assert tokens == [("0", HOSTILE.replace("\u202e", "⟨202e⟩")), ("1", "a")]
    [count] = [text for _, a, text in shown.elements if a.get("id") == "count"]
    assert count.startswith("1 of 1 trajectories; the tokens of all")
