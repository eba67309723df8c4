"""Reading recipes: what merges into what, where every key came from, and a sentence for each thing that can be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.errors import ConfigError
from miles_core.recipe import bundled_recipes, load_recipe, merge

STAGED = """
groups: 4
data: {use: jsonl, path: a.jsonl}
models:
  policy:
    trainer: {use: torch, lr: 1.0e-3}
stages:
  sft:
    steps: 2
    rollout: read
  rl:
    steps: 3
    models: {policy: {advantage: {use: grpo}}}
  last:
"""


@pytest.fixture
def recipe(tmp_path):
    """Write recipes; the path of the last one."""

    def write(**texts):
        for name, text in texts.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(text if isinstance(text, str) else text.decode("latin1"), encoding="latin1")
        return str(path)

    return write


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 3\ngroups: 4\nsteps: 5\n", ["r.yaml:3", "'steps'", "twice"]),
        ("models:\n  policy:\n    path: a\n    path: b\n", ["r.yaml:4", "'models.policy.path'", "twice"]),
        ("steps: [3\n", ["r.yaml", "not valid YAML", "line 1"]),
        ("- steps: 3\n", ["r.yaml", "list", "mapping"]),
        ("[]\n", ["r.yaml", "list", "mapping"]),
        ("false\n", ["r.yaml", "bool", "mapping"]),
        ("steps: 3 # \xff\n", ["r.yaml", "utf-8"]),
        ("steps: 3\nextends: missing.yaml\n", ["r.yaml:2", "'missing.yaml'", "no recipe file"]),
        ("extends: quikstart\n", ["r.yaml:1", "Did you mean 'quickstart'"]),
        ("extends: [a.yaml, b.yaml]\n", ["r.yaml:1", "list", "one recipe"]),
        ("steps: 1\nstages: [sft, rl]\n", ["r.yaml:2", "stages is a list"]),
        ("stages:\n  sft: 500\n", ["r.yaml:2", "stage sft is a int"]),
    ],
)
def test_a_malformed_recipe_is_a_sentence_with_its_line(recipe, text, expected):
    with pytest.raises(ConfigError) as found:
        load_recipe(recipe(r=text), ["seed=3"])
    for piece in expected:
        assert piece in str(found.value)


def test_a_missing_recipe_names_the_nearest_bundled_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe is called 'quikstart'\. Did you mean 'quickstart'\?"):
        load_recipe("quikstart")
    with pytest.raises(ConfigError, match=r"no recipe file .*nowhere\.yaml"):
        load_recipe(str(tmp_path / "nowhere.yaml"))


def test_recipes_that_extend_each_other_are_named_in_order(recipe):
    first = recipe(b="extends: c.yaml\n", c="extends: a.yaml\n", a="extends: b.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: \S+a\.yaml → \S+b\.yaml → \S+c\.yaml → \S+a\.yaml"):
        load_recipe(first)


def test_every_bundled_recipe_reads_and_has_a_name():
    assert "quickstart" in bundled_recipes()
    for name in bundled_recipes():
        assert load_recipe(name).data["name"]


def test_without_a_name_a_recipe_is_called_like_its_file(recipe):
    assert load_recipe(recipe(mine="steps: 3\n")).data["name"] == "mine"


# ---- merging -----------------------------------------------------------------------------------------------------------


def test_a_recipe_says_what_differs_from_the_one_it_extends(recipe, tmp_path):
    path = recipe(
        base="steps: 3\ndata: {use: jsonl, path: a.jsonl}\ngroups: 2\n", child="extends: base.yaml\nsteps: 5\ndata: {path: b.jsonl}\n"
    )
    read = load_recipe(path)
    assert read.data == {"steps": 5, "groups": 2, "data": {"use": "jsonl", "path": "b.jsonl"}, "name": "child"}
    assert read.origin(("steps",)) == f"{tmp_path}/child.yaml:2"
    assert read.origin(("groups",)) == f"{tmp_path}/base.yaml:3"
    assert read.origin(("data", "path")) == f"{tmp_path}/child.yaml:3"
    assert read.origin(("data", "nothing", "here")) == f"{tmp_path}/child.yaml:3"  # the nearest mapping around it
    assert read.origin(("nothing",)) == f"{tmp_path}/child.yaml"


@pytest.mark.parametrize(
    ("named", "expected"),
    [("{c: {}, b: {}, a: {}}", ["c", "b", "a"]), ("{c: {}, a: {}}", ["a", "b", "c"]), ("{c: {}}", ["a", "b", "c"])],
)
def test_who_names_all_stages_of_the_recipe_below_says_their_order(recipe, named, expected):
    path = recipe(base="stages: {a: {}, b: {}}\n", child=f"extends: base.yaml\nstages: {named}\n")
    assert list(load_recipe(path).data["stages"]) == expected


def test_plugins_are_looked_for_beside_every_recipe_of_the_chain(recipe, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "child.yaml").write_text("extends: ../base.yaml\n")
    recipe(base="steps: 3\n")
    assert load_recipe(str(tmp_path / "deep" / "child.yaml")).directories == [tmp_path / "deep", tmp_path]


def test_extends_is_seen_from_the_recipe_that_says_it_not_from_where_one_stands(recipe, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "base.yaml").write_text("steps: 99\n")
    path = recipe(child="extends: base.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no recipe file"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("base", "overlay", "merged"),
    [
        ({"use": "a", "x": 1}, {"use": "a", "y": 2}, {"use": "a", "x": 1, "y": 2}),
        ({"use": "a", "x": 1}, {"use": "b", "y": 2}, {"use": "b", "y": 2}),  # options of a do not leak into b
        ({"use": "a", "x": 1}, {"x": 2}, {"use": "a", "x": 2}),
        ("a", {"x": 2}, {"use": "a", "x": 2}),
        ({"use": "a", "x": 1}, "b", {"use": "b"}),
        ({"use": "a", "x": 1}, "a", {"use": "a", "x": 1}),
        ({"x": {"y": 1, "z": [1]}}, {"x": {"z": [2]}}, {"x": {"y": 1, "z": [2]}}),
        ({"x": 1}, {"x": None}, {"x": None}),
    ],
)
def test_what_merges_into_what(base, overlay, merged):
    assert merge({"plug": base}, {"plug": overlay}) == {"plug": merged}


trees = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), max_leaves=12)


@given(trees, trees)
def test_merging_is_idempotent_and_the_overlay_wins(base, overlay):
    once = merge(base, overlay)
    assert merge(once, overlay) == once
    assert merge(base, base) == base
    if isinstance(base, dict) and isinstance(overlay, dict):
        assert set(once) == set(base) | set(overlay)
        assert all(once[k] == base[k] for k in base.keys() - overlay.keys())


# ---- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("x=1e-4", 1e-4),
        ("x=1E6", 1e6),
        ("x=-3e+2", -300.0),
        ("x=1.5e-3", 1.5e-3),
        ("x=2", 2),
        ("x=true", True),
        ("x=null", None),
        ("x=[0.9, 1e-2]", [0.9, 1e-2]),
        ("x={lr: 1e-5}", {"lr": 1e-5}),
        ("x=a=b", "a=b"),
        ("x='1e-4'", "1e-4"),
        ("x=1.2.3", "1.2.3"),
        ("x=7b", "7b"),
        ("x=", None),
    ],
)
def test_values_are_yaml_and_1e_4_is_a_number(recipe, override, value):
    given = load_recipe(recipe(r="steps: 1\n"), [override]).data["x"]
    assert given == value and type(given) is type(value)


def test_1e_4_is_a_number_in_a_file_too(recipe):
    assert load_recipe(recipe(r="a: {lr: 1e-4, eps: [1e-8], text: '1e-4'}\n")).data["a"] == {"lr": 1e-4, "eps": [1e-8], "text": "1e-4"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", ["'seed'", "key=value", "seed=3"]),
        ("=3", ["'=3'", "key=value"]),
        ("seed=[3", ["'seed=[3'", "not a YAML value"]),
        ("steps=9", ["steps is set by stages sft, rl", "stages.sft.steps=9 or stages.rl.steps=9"]),
        ("model.advantage.use=rloo", ["set by stage rl", "stages.rl.models.policy.advantage.use=rloo"]),
        ("rollout.max_length=5", ["set by stage sft", "stages.sft.rollout.max_length=5"]),  # sft says "rollout: read" as a whole
        ("stages.lr.steps=9", ["stages.NAME.key", "sft, rl, last"]),
        ("stages.sft=9", ["stages.NAME.key", "sft, rl, last"]),
    ],
)
def test_an_override_that_cannot_be_meant(recipe, override, expected):
    with pytest.raises(ConfigError) as found:
        load_recipe(recipe(r=STAGED), [override])
    for piece in expected:
        assert piece in str(found.value)


def test_overrides_reach_the_recipe_its_policy_and_its_stages(recipe):
    read = load_recipe(recipe(r=STAGED), ["groups=8", "model.trainer.lr=1e-4", "stages.rl.steps=9", "stages.last.steps=1", "data.path=b"])
    assert read.data["groups"] == 8
    assert read.data["models"]["policy"]["trainer"] == {"use": "torch", "lr": 1e-4}
    assert read.data["data"] == {"use": "jsonl", "path": "b"}
    assert read.data["stages"]["rl"]["steps"] == 9 and read.data["stages"]["sft"]["steps"] == 2
    assert read.data["stages"]["last"] == {"steps": 1}
    assert read.origin(("models", "policy", "trainer", "lr")) == "override model.trainer.lr=1e-4"


def test_an_option_and_the_plugin_it_belongs_to_may_come_in_any_order(recipe):
    overrides = ["data.column=text", "data.use=parquet"]
    expected = {"use": "parquet", "column": "text"}  # and not jsonl's path
    assert load_recipe(recipe(r=STAGED), overrides).data["data"] == expected
    assert load_recipe(recipe(r=STAGED), overrides[::-1]).data["data"] == expected


def test_the_last_of_two_overrides_wins(recipe):
    assert load_recipe(recipe(r=STAGED), ["groups=8", "groups=9"]).data["groups"] == 9
