"""Mixtures: shares as the weights say in every stretch, each part in epochs of its own, from any cut on the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.config import RunConfig, resolve
from miles_core.cursor import Cursor
from miles_core.data.mixture import Draws, Mixture, MixtureSource
from miles_core.errors import ConfigError, DataError
from miles_core.plugins import config_class
from miles_core.protocols import BuildContext
from miles_core.randomness import key, uniform

USE = "miles_core.data.mixture:Mixture"
CONTEXT = BuildContext(run_dir=Path(), run="test", seed=0)


def texts(name: str, size: int) -> dict:
    return {"use": "texts", "texts": [f"{name}{i}" for i in range(size)]}


def mixture(parts: dict[str, tuple[dict, float]]) -> MixtureSource:
    options = {name: {"data": data, "weight": weight} for name, (data, weight) in parts.items()}
    return config_class("data_source", USE).model_validate({"use": USE, "parts": options}).build(CONTEXT)


weights = st.lists(st.floats(0.001, 100), min_size=1, max_size=6).map(lambda w: {f"p{i}": x for i, x in enumerate(w)})


@given(weights=weights, seed=st.integers(0, 2**64 - 1))
def test_draws_are_those_of_a_table_of_all_times(weights: dict[str, float], seed: int) -> None:
    """The definition, written out: every draw of every part with its time, sorted once."""
    count, total = 100, sum(weights.values())
    table = []
    for part, (name, weight) in enumerate(weights.items()):
        numbers = np.arange(count)
        times = (numbers + uniform(np.full(count, key("mixture", name, seed), np.uint64), numbers)) / (weight / total)
        table += [(time, part, int(number)) for time, number in zip(times, numbers, strict=True)]
    draws = Draws(weights, seed)
    assert [draws.at(position) for position in range(count)] == [(part, number) for _, part, number in sorted(table)[:count]]


@given(weights=weights, seed=st.integers(0, 1000), start=st.integers(0, 10**9))
def test_far_along_nothing_is_lost_or_drawn_twice(weights: dict[str, float], seed: int, start: int) -> None:
    """Numbers of each part go up by one from draw to draw, and stand where shares say, however far the run is."""
    draws, total = Draws(weights, seed), sum(weights.values())
    seen: dict[int, list[int]] = defaultdict(list)
    for position in range(start, start + 50):
        part, number = draws.at(position)
        seen[part].append(number)
        share = list(weights.values())[part] / total
        assert abs(number - share * position) <= 1 + len(weights) * share + 1e-6
    assert all(np.diff(numbers).tolist() == [1] * (len(numbers) - 1) for numbers in seen.values())


def test_every_beginning_is_mixed_as_the_weights_say() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
    for seed in range(8):
        drawn, counts = Draws(shares, seed), Counter()
        for position in range(400):
            counts[drawn.at(position)[0]] += 1
            for part, share in enumerate(shares.values()):
                assert abs(counts[part] - share * (position + 1)) <= 1 + 4 * share


def test_the_order_of_draws_is_irregular() -> None:
    """Two equal parts do not alternate: the number of changes over 2,000 draws is far from 0 and from 2,000, and seeds differ."""
    first, second = ([Draws({"a": 1, "b": 1}, seed).at(p)[0] for p in range(2000)] for seed in (0, 1))
    changes = int(np.abs(np.diff(first)).sum())
    assert 1000 < changes < 1700 and first != second


def test_each_part_goes_through_its_own_epochs() -> None:
    """What a part gives is what a cursor over it alone gives; the epoch is the part's, so that group names never come twice."""
    source = mixture({"small": (texts("s", 3), 1), "large": (texts("l", 50), 1)})
    cursor = Cursor(source, seed=5, shuffle=True)
    by_part: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for position in range(90):
        prompt = cursor.prompt(position)
        by_part[prompt.metadata["source"]].append((cursor.epoch(position), prompt.text))
    assert {name: len(draws) for name, draws in by_part.items()}.keys() == {"small", "large"}
    for name, size in (("small", 3), ("large", 50)):
        draws = by_part[name]
        assert [epoch for epoch, _ in draws] == [i // size for i in range(len(draws))]
        for start in range(0, len(draws) - size + 1, size):
            assert sorted(text for _, text in draws[start : start + size]) == sorted(f"{name[0]}{i}" for i in range(size))
    names = [f"e{cursor.epoch(p)}-{cursor.prompt(p).id}" for p in range(500)]
    assert len(set(names)) == 500


def test_parts_of_one_size_have_orders_of_their_own() -> None:
    cursor = Cursor(mixture({"a": (texts("a", 30), 1), "b": (texts("b", 30), 1)}), 0, True)
    drawn = [cursor.prompt(p).text for p in range(60)]
    first, second = ([text[1:] for text in drawn if text[0] == part][:20] for part in "ab")
    assert first != second


@given(seed=st.integers(0, 2**32), shuffle=st.booleans(), cut=st.integers(0, 40))
def test_from_any_cut_the_prompts_are_those_of_the_undisturbed_run(seed: int, shuffle: bool, cut: int) -> None:
    def build() -> Cursor:
        inner = {"use": USE, "parts": {"x": {"data": texts("x", 4), "weight": 1}, "y": {"data": texts("y", 9), "weight": 3}}}
        return Cursor(mixture({"in": (inner, 2), "out": (texts("o", 7), 1)}), seed, shuffle)

    undisturbed, resumed = build(), build()
    wanted = [(undisturbed.epoch(p), undisturbed.prompt(p)) for p in range(40)]
    assert [(resumed.epoch(p), resumed.prompt(p)) for p in range(cut, 40)] == wanted[cut:]


def test_parts_of_parts_have_joined_names() -> None:
    inner = {"use": USE, "parts": {"x": {"data": texts("x", 1), "weight": 1}}}
    source = mixture({"in": (inner, 2), "out": (texts("o", 2), 1)})
    assert [(p.id, p.text, p.metadata) for p in source] == [
        ("in/x/0", "x0", {"source": "in/x"}),
        ("out/0", "o0", {"source": "out"}),
        ("out/1", "o1", {"source": "out"}),
    ]


def test_unshuffled_parts_keep_their_order() -> None:
    cursor = Cursor(mixture({"a": (texts("a", 3), 1), "b": (texts("b", 100), 2)}), 0, False)
    drawn = [cursor.prompt(p).text for p in range(30)]
    assert [t for t in drawn if t[0] == "b"] == [f"b{i}" for i in range(sum(t[0] == "b" for t in drawn))]
    assert [t for t in drawn if t[0] == "a"] == [f"a{i % 3}" for i in range(sum(t[0] == "a" for t in drawn))]


def test_a_wrong_key_of_a_part_is_named_where_it_was_written(tmp_path: Path) -> None:
    """And what is known there is said, as everywhere in a recipe."""
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        f"name: mix\nmodels: {{}}\nrollout: read\nsteps: 1\ngroups: 1\ndata:\n  use: {USE}\n  parts:\n    a:\n      weight: 1\n"
        "      data: {use: jsonl, path: rows.jsonl, prompt_feild: q}\n"
    )
    with pytest.raises(
        ConfigError, match=r"mix\.yaml:11: unknown key 'data\.parts\.a\.data\.prompt_feild'\. Did you mean 'prompt_field'\?"
    ):
        resolve(str(recipe))
    recipe.write_text(recipe.read_text().replace("feild", "field"))
    run = resolve(str(recipe), ["data.parts.a.weight=4"])
    assert run.stages["main"].data.parts["a"].weight == 4


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, "at least 1 item"),
        ({"a": {"data": texts("a", 1)}}, "weight"),
        ({"a": {"data": texts("a", 1), "weight": 0}}, "greater than 0"),
        ({"a": {"data": texts("a", 1), "weight": float("nan")}}, "finite number|greater than 0"),
        ({"a": {"data": texts("a", 1), "weight": float("inf")}}, "finite number"),
        ({"a/b": {"data": texts("a", 1), "weight": 1}}, "has no '/'"),
        ({"a": {"data": {"use": "texts", "texts": []}, "weight": 1}}, "at least 1 item"),
    ],
)
def test_bad_parts_are_refused(parts: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Mixture.model_validate({"use": USE, "parts": parts})


def test_metadata_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "source": "web"}\n')
    source = mixture({"a": ({"use": "jsonl", "path": str(tmp_path / "rows.jsonl"), "metadata_fields": ["source"]}, 1)})
    with pytest.raises(DataError, match=r"prompt rows\.jsonl:1 of part 'a' has metadata 'source' of its own"):
        source[0]


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    """``config.yaml`` of a run holds the parts with all their options; resume builds the same mixture from it."""
    config = {
        "name": "mix",
        "stages": {
            "main": {
                "steps": 1,
                "groups": 1,
                "models": {},
                "rollout": "read",
                "data": {"use": USE, "parts": {"a": {"data": texts("a", 2), "weight": 2}, "b": {"data": texts("b", 2), "weight": 1}}},
            }
        },
    }
    run = RunConfig.from_mapping(config)
    (tmp_path / "config.yaml").write_text(run.to_yaml())
    again = RunConfig.from_resolved(tmp_path / "config.yaml")
    assert again.stages["main"].data == run.stages["main"].data and again.fingerprint() == run.fingerprint()
    assert [c.use for c in run.stages["main"].data.nested()] == [USE, "texts", "texts"]
