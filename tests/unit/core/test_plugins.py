"""Plug-ins: found by entry point, decorator and module:attribute; what is wrong with one is said with name, origin and fix."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from miles_core import plugin_finding
from miles_core.errors import PluginError
from miles_core.plugin_finding import decorator, did_you_mean, find_all, import_object
from miles_core.plugins import POINTS, PluginConfig, check_protocol, config_class, plug
from miles_core.protocols import BuildContext

CONTEXT = BuildContext(run_dir=Path(), run="test", seed=0)
Install = Callable[..., str]


@pytest.fixture(autouse=True)
def no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules and decorated objects of a test are gone after it."""
    before = set(sys.modules)
    monkeypatch.setattr(plugin_finding, "_DECORATED", {})
    yield
    for name in set(sys.modules) - before:
        if name.startswith("acme"):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package (one module, as if pip had installed it) on the path, and give its module's name."""

    def put(source: str, *, version: str = "1.2.3", package: str = "acme-rewards", **entry_points: str) -> str:
        site = tmp_path / package
        module = package.replace("-", "_")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        groups = [f"[miles.{point}]\n{entry}\n" for point, entry in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(groups))
        monkeypatch.syspath_prepend(site)
        return module

    return put


BREVITY = """
    def brevity(sample, *, limit: int = 40, strict: bool = False):
        return 1.0 if len(sample) <= limit else float(not strict)
"""


def build(point: str, use: str, **options: Any) -> Any:
    """Configure and build, as a recipe does."""
    return config_class(point, use).model_validate({"use": use, **options}).build(CONTEXT)


# ---- found ----------------------------------------------------------------------------------------------------------


def test_an_entry_point_is_found_with_its_origin(install: Install) -> None:
    install(BREVITY, reward="brevity = acme_rewards:brevity")
    found = find_all("reward")["brevity"]
    assert found.origin == "acme-rewards 1.2.3 (acme_rewards:brevity)" and found.point == "reward"
    assert "acme_rewards" not in sys.modules, "finding imports nothing"
    assert build("reward", "brevity", limit=3)([0] * 3) == 1.0
    assert build("reward", "brevity", limit=2, strict=True)([0] * 3) == 0.0


def test_what_is_installed_later_is_found_and_what_is_removed_is_not(install: Install, tmp_path: Path) -> None:
    install(BREVITY, reward="brevity = acme_rewards:brevity")
    assert "brevity" in find_all("reward")
    info = tmp_path / "acme-rewards" / "acme_rewards-1.2.3.dist-info"
    info.rename(tmp_path / "elsewhere")
    os.utime(tmp_path / "acme-rewards", ns=(0, 0))  # a file system's clock may tick slower than this test
    assert "brevity" not in find_all("reward")
    (tmp_path / "elsewhere").rename(info)
    assert "brevity" in find_all("reward")


def test_a_decorated_function_is_found() -> None:
    @decorator("reward")
    def short(sample: Any, *, limit: int = 2) -> float:
        return float(len(sample) <= limit)

    @decorator("reward")(name="fair", unit="group", needs={"values"})
    def of_a_group(samples: Any) -> list[float]:
        return [1.0] * len(samples)

    assert short([]) == 1.0, "it stays the function it was"
    assert find_all("reward")["short"].origin == f"decorated in {__name__}"
    assert "short" not in find_all("loss")
    assert build("reward", "short")([1, 2, 3]) == 0.0
    fair = config_class("reward", "fair")
    assert fair.needs == {"values"} and fair.unit == "group" and build("reward", "fair")([1, 2]) == [1.0, 1.0]  # ty: ignore


def test_a_function_in_a_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_beside.py").write_text(dedent(BREVITY))
    monkeypatch.syspath_prepend(tmp_path)
    assert build("reward", "acme_beside:brevity", limit=1)([1, 2]) == 1.0
    assert config_class("reward", "acme_beside:brevity").needs == frozenset()


def test_a_nested_attribute_is_found(install: Install) -> None:
    install("class Rewards:\n        @staticmethod\n        def one(sample): return 1.0")
    assert import_object("acme_rewards:Rewards.one")(None) == 1.0


def test_a_class_is_built_with_its_options(install: Install) -> None:
    install("""
        class Ends:
            def __init__(self, *, word: str):
                self.word = word
            def __call__(self, sample):
                return float(sample.endswith(self.word))
    """)
    assert build("reward", "acme_rewards:Ends", word="b")("ab") == 1.0


def test_a_reward_may_be_sync_or_async(install: Install) -> None:
    install("async def slow(sample): return 1.0\ndef fast(sample): return 1.0")
    assert inspect.iscoroutinefunction(build("reward", "acme_rewards:slow").func)
    assert build("reward", "acme_rewards:fast")(None) == 1.0


# ---- options --------------------------------------------------------------------------------------------------------


def test_options_are_the_keyword_only_arguments(install: Install) -> None:
    install(BREVITY)
    config = config_class("reward", "acme_rewards:brevity").model_validate({"use": "acme_rewards:brevity", "limit": "7", "weight": 0.5})
    assert config.options() == {"limit": 7, "strict": False}, "weight and timeout_s are every reward's, not the function's"
    assert config.weight == 0.5  # ty: ignore[missing-attribute]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"limt": 3}, r"limt\s+Extra inputs are not permitted"), ({"limit": "many"}, r"limit\s+Input should be a valid integer")],
)
def test_an_option_that_does_not_fit_is_named(install: Install, options: dict, complaint: str) -> None:
    install(BREVITY, reward="brevity = acme_rewards:brevity")
    with pytest.raises(ValidationError, match=complaint):
        config_class("reward", "brevity").model_validate({"use": "brevity", **options})


def test_an_option_without_default_is_required(install: Install) -> None:
    install("def upto(sample, *, limit: int): return float(len(sample) <= limit)")
    with pytest.raises(ValidationError, match=r"limit\s+Field required"):
        build("reward", "acme_rewards:upto")
    assert build("reward", "acme_rewards:upto", limit=1)([1]) == 1.0


def test_types_of_options_are_read_whatever_else_the_signature_names(install: Install) -> None:
    """``Sample`` exists for type checkers only; the option's type and its bound hold all the same."""
    install("""
        from __future__ import annotations
        from typing import TYPE_CHECKING, Annotated
        from pydantic import Field
        if TYPE_CHECKING:
            from miles_core.sample import Sample
        def upto(sample: Sample, *, limit: Annotated[int, Field(gt=0)] = 1) -> float:
            return float(limit)
    """)
    assert build("reward", "acme_rewards:upto", limit="3")(None) == 3.0
    for wrong in ("many", 0):
        with pytest.raises(ValidationError, match="limit"):
            build("reward", "acme_rewards:upto", limit=wrong)


def test_an_option_whose_type_cannot_be_read(install: Install) -> None:
    install("""
        from __future__ import annotations
        def upto(sample, *, limit: Missing = 1): return 1.0
    """)
    with pytest.raises(PluginError, match=r"reward 'acme_rewards:upto'.*'Missing' is not defined.*outside TYPE_CHECKING"):
        config_class("reward", "acme_rewards:upto")


@pytest.mark.parametrize("name", ["weight", "timeout_s", "use", "unit", "needs", "build", "_private"])
def test_an_option_with_a_name_that_is_taken(install: Install, name: str) -> None:
    """``weight`` is every reward's share in the sum; a function's own would silently never be set."""
    install(f"def brevity(sample, *, {name}: int = 1): return 1.0")
    with pytest.raises(PluginError, match=rf"'acme_rewards:brevity': its option '{name}' has a name that is taken"):
        config_class("reward", "acme_rewards:brevity")


def test_an_option_of_a_type_no_recipe_can_hold(install: Install) -> None:
    install("class Thing: pass\ndef brevity(sample, *, thing: Thing = None): return 1.0")
    with pytest.raises(PluginError, match=r"'acme_rewards:brevity': the type of one of its options"):
        config_class("reward", "acme_rewards:brevity")


# ---- configs that are declared torch-free ---------------------------------------------------------------------------

DECLARED = """
    from typing import ClassVar
    from miles_core.plugins import LossConfig

    class Clip(LossConfig):
        point: ClassVar[str] = "loss"
        target: ClassVar[str] = "{target}"
        needs: ClassVar[frozenset[str]] = frozenset({{"old_logprobs"}})
        clip: float = 0.2
"""


def test_a_declared_function_gets_its_options(install: Install) -> None:
    install(DECLARED.format(target="acme_impl:clip"), loss="clip = acme_rewards:Clip")
    install("def clip(inputs, *, clip): return inputs, clip", package="acme-impl")
    config = config_class("loss", "clip").model_validate({"use": "clip", "clip": 0.3})
    assert config.needs == {"old_logprobs"} and "acme_impl" not in sys.modules, "nothing heavy is imported yet"
    assert config.build(CONTEXT)("inputs") == ("inputs", 0.3)


def test_a_declared_class_gets_config_and_context(install: Install) -> None:
    install(DECLARED.format(target="acme_impl:Clip"), loss="clip = acme_rewards:Clip")
    install(
        """
        class Clip:
            def __init__(self, config, context):
                self.given = config.clip, context.run
            def __call__(self, inputs):
                return self.given
        """,
        package="acme-impl",
    )
    assert build("loss", "clip")(None) == (0.2, "test")


WORLD = """
    class World:
        def __init__(self, *, size: int = 3):
            self.size = size
        async def reset(self, prompt): ...
        async def step(self, action): ...
"""


def test_an_environment_is_made_for_each_trajectory(install: Install) -> None:
    """Plain or declared, what is built makes a new world at each call."""
    install(WORLD, package="acme-world")
    install(
        """
        from typing import ClassVar
        from miles_core.plugins import PluginConfig
        class World(PluginConfig):
            point: ClassVar[str] = "environment"
            target: ClassVar[str] = "acme_world:World"
            size: int = 3
        """,
        environment="world = acme_rewards:World",
    )
    for use in ("acme_world:World", "world"):
        make = build("environment", use, size=5)
        one, other = make(), make()
        assert one is not other and one.size == other.size == 5


def test_an_environment_is_a_class(install: Install) -> None:
    install("def world(): return None")
    with pytest.raises(PluginError, match=r"environment 'acme_rewards:world' of module acme_rewards.*is a function; expected a class"):
        build("environment", "acme_rewards:world")


# ---- what is wrong is said ------------------------------------------------------------------------------------------


def test_a_name_nobody_has(install: Install) -> None:
    install(BREVITY, reward="brevity = acme_rewards:brevity")
    with pytest.raises(PluginError, match=r"no reward is called 'brevty'. Did you mean 'brevity'\? Known: .*brevity.*module:attribute"):
        config_class("reward", "brevty")


def test_the_nearest_word() -> None:
    assert did_you_mean("gropo", ["grpo", "reinforce"]) == " Did you mean 'grpo'?"
    assert did_you_mean("xyz", ["grpo", "reinforce"]) == ""


@pytest.mark.parametrize(
    ("missing", "extra"),
    [("torch", r"miles-core\[torch\]"), ("sglang", r"miles-rollout\[sglang\]"), ("math_verify", r"miles-core\[math\]")],
)
def test_a_missing_extra_is_named(install: Install, monkeypatch: pytest.MonkeyPatch, missing: str, extra: str) -> None:
    """With the package and version that needs it, whether it is missed when the plug-in is read or when it is built."""
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    install(f"import {missing}.nn", reward="brevity = acme_rewards:brevity")
    with pytest.raises(
        PluginError, match=rf"reward 'brevity' of acme-rewards 1\.2\.3 .*does not import: '{missing}.*' is not installed.*{extra}"
    ):
        config_class("reward", "brevity")
    install(DECLARED.format(target="acme_impl:clip"), version="4.5", package="acme-losses", loss="clip = acme_losses:Clip")
    install(f"import {missing}", package="acme-impl")
    with pytest.raises(
        PluginError, match=rf"loss 'clip' of acme-losses 4\.5 .*target acme_impl:clip.*does not import: '{missing}'.*{extra}"
    ):
        build("loss", "clip")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import acme_nowhere", "module 'acme_nowhere' is not installed"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError"),
        ("", "AttributeError.*has no attribute 'brevity'"),
    ],
)
def test_what_does_not_import_says_why(install: Install, source: str, reason: str) -> None:
    install(source, reward="brevity = acme_rewards:brevity")
    with pytest.raises(
        PluginError, match=rf"reward 'brevity' of acme-rewards 1\.2\.3 \(acme_rewards:brevity\) does not import: .*{reason}"
    ):
        config_class("reward", "brevity")


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(PluginError, match=r"reward 'acme_nowhere:f' of module acme_nowhere does not import.*not beside the recipe"):
        config_class("reward", "acme_nowhere:f")


def test_an_attribute_that_is_not_there(install: Install) -> None:
    install(BREVITY)
    with pytest.raises(PluginError, match=r"module 'acme_rewards' has no 'brevty'. Did you mean 'brevity'\?"):
        config_class("reward", "acme_rewards:brevty")


def test_a_path_without_an_attribute() -> None:
    with pytest.raises(PluginError, match="'acme_rewards' is not of the form module:attribute"):
        import_object("acme_rewards")


def test_two_packages_with_one_name(install: Install) -> None:
    install(BREVITY, reward="brevity = acme_rewards:brevity")
    install(BREVITY, reward="brevity = acme_other:brevity", package="acme-other", version="9.0")
    with pytest.raises(PluginError, match=r"'brevity' is registered by both .*; uninstall one") as caught:
        config_class("reward", "brevity")
    assert "acme-rewards 1.2.3" in str(caught.value) and "acme-other 9.0" in str(caught.value)


def test_a_plug_in_of_another_point(install: Install) -> None:
    install(DECLARED.format(target="acme_impl:clip"), reward="clip = acme_rewards:Clip")
    with pytest.raises(PluginError, match=r"'clip' of acme-rewards 1\.2\.3.* is a loss, not a reward; use it there"):
        config_class("reward", "clip")


@pytest.mark.parametrize(
    "source",
    ["brevity = 3", "from functools import partial\nbrevity = partial(len)", "class B:\n  def __call__(self, s): ...\nbrevity = B()"],
)
def test_what_is_no_function_or_class(install: Install, source: str) -> None:
    install(source)
    with pytest.raises(PluginError, match=r"'acme_rewards:brevity' of module acme_rewards is a \w+; expected a function, a class"):
        config_class("reward", "acme_rewards:brevity")


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        ({"neds": {"values"}}, "declares 'neds'; a decorator takes"),
        ({"unit": "samples"}, "declares unit 'samples'; expected sample, group or batch"),
    ],
)
def test_what_a_decorator_does_not_take(declared: dict, complaint: str) -> None:
    decorator("reward")(name="odd", **declared)(lambda sample: 1.0)
    with pytest.raises(PluginError, match=f"'odd' {complaint}"):
        config_class("reward", "odd")


# What is handed to a point, and what is said: (point, source of `it`, message).
MISFITS = [
    ("reward", "def it(): return 1.0", r"__call__\(\) cannot be called as __call__\(sample\)"),
    ("reward", "def it(sample, label): return 1.0", r"__call__\(sample, label\) cannot be called as __call__\(sample\).*'label'"),
    ("loss", "async def it(inputs): ...", r"__call__ must be a plain function: __call__\(inputs\)"),
    ("generate", "def it(trajectory): ...", r"__call__ must be async: async __call__\(trajectory\)"),
    ("rollout", "async def it(prompt): ...", r"__call__\(prompt\) cannot be called as async __call__\(prompt, context\)"),
    ("tracker", "class it:\n  def log(self, step, metrics): ...", r"has no close\(\), which every tracker has"),
    (
        "tracker",
        "class it:\n  def log(self, metrics): ...\n  def close(self): ...",
        r"log\(metrics\) cannot be called as log\(step, metrics\)",
    ),
    ("tracker", "class it:\n  async def log(self, step, metrics): ...\n  def close(self): ...", "log must be a plain function"),
    ("environment", "class it:\n  async def reset(self, prompt): ...", r"has no async step\(action\)"),
    ("environment", "class it:\n  async def reset(self, prompt): ...\n  def step(self, action): ...", "step must be async"),
    ("environment", "class it:\n  async def reset(self): ...\n  async def step(self, action): ...", r"reset\(self\) cannot be called as"),
    ("data_source", "class it:\n  def __len__(self): return 0", r"has no __getitem__\(index\)"),
    ("weight_transport", "class it:\n  def publish(self, source, sinks, version): ...", "publish must be async"),
]


@pytest.mark.parametrize(("point", "source", "message"), MISFITS, ids=[f"{m[0]}: {m[2]}" for m in MISFITS])
def test_what_does_not_keep_the_protocol(install: Install, point: str, source: str, message: str) -> None:
    install(source, **{point: "misfit = acme_rewards:it"})
    with pytest.raises(PluginError, match=rf"{point} 'misfit' of acme-rewards 1\.2\.3 .*{message}"):
        build(point, "misfit")


def test_a_declared_target_is_held_to_the_protocol(install: Install) -> None:
    install(DECLARED.format(target="acme_impl:clip"), loss="clip = acme_rewards:Clip")
    install("def clip(*, clip): ...", package="acme-impl")
    with pytest.raises(PluginError, match=r"loss 'clip' of acme-rewards 1\.2\.3.*cannot be called as __call__\(inputs\)"):
        build("loss", "clip")


def test_extra_arguments_with_defaults_are_fine(install: Install) -> None:
    install("def it(sample, verbose=False): return 1.0")
    assert build("reward", "acme_rewards:it")(None) == 1.0


def test_inherited_methods_count() -> None:
    class Base:
        def log(self, step: int, metrics: dict) -> None: ...

    class Child(Base):
        def close(self) -> None: ...

    check_protocol(Child(), POINTS["tracker"].protocol, "tracker", "tracker")


# ---- in a recipe ----------------------------------------------------------------------------------------------------


class Recipe(BaseModel):
    """A tree with one plug-in in it."""

    reward: plug("reward")  # ty: ignore[invalid-type-form]


def test_a_recipe_names_a_plug_in_or_gives_options(install: Install) -> None:
    install(BREVITY, reward="brevity = acme_rewards:brevity")
    assert Recipe(reward="brevity").reward.options() == {"limit": 40, "strict": False}
    recipe = Recipe(reward={"use": "brevity", "limit": 3})
    assert isinstance(recipe.reward, PluginConfig) and recipe.reward.use == "brevity"
    written = recipe.model_dump()
    assert written["reward"]["limit"] == 3, "its own options are in the resolved recipe"
    assert Recipe.model_validate(written).reward.options() == recipe.reward.options()


def test_a_recipe_that_names_nothing(install: Install) -> None:
    for value in (3, {"limit": 3}, {"use": 3}, None):
        with pytest.raises(ValidationError, match="expected the name of a reward, or a mapping with 'use'"):
            Recipe.model_validate({"reward": value})
    install(BREVITY, reward="brevity = acme_rewards:brevity")
    with pytest.raises(ValidationError, match="limt"):
        Recipe.model_validate({"reward": {"use": "brevity", "limt": 3}})
    with pytest.raises(PluginError, match="no reward is called 'brevit'"):
        Recipe.model_validate({"reward": "brevit"})


def test_a_library_that_is_missing_when_the_plugin_is_built_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default tracker imports tensorboard only when it is built."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)  # import machinery: as if it were not installed
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = config_class("tracker", "tensorboard").model_validate({"use": "tensorboard"})
    with pytest.raises(PluginError, match=r"tensorboard.*miles-core\[report\]"):
        config.build(BuildContext(tmp_path, "run", 0))
