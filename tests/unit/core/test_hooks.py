"""Hooks: called at their moments and in order; what could never be called is an error, not silence."""

from __future__ import annotations

import pytest

from miles_core.errors import PluginError
from miles_core.hooks import MOMENTS, Hooks


def recorder(log, name, *moments, is_async=False):
    """A hook that writes (name, moment, loop) into the log."""

    def method(moment):
        async def later(self, loop):
            log.append((name, moment, loop))

        def now(self, loop):
            log.append((name, moment, loop))

        return later if is_async else now

    return type("Recorder", (), {m: method(m) for m in moments})()


async def test_every_moment_reaches_the_hooks_that_have_it_in_the_order_of_the_recipe():
    log = []
    hooks = Hooks({"a": recorder(log, "a", *MOMENTS), "b": recorder(log, "b", "after_step", "on_end", is_async=True)})
    for moment in MOMENTS:
        await hooks.fire(moment, "the loop")
    expected = [("a", m, "the loop") for m in MOMENTS]
    expected.insert(expected.index(("a", "after_step", "the loop")) + 1, ("b", "after_step", "the loop"))
    assert log == [*expected, ("b", "on_end", "the loop")]


def test_the_moments_are_those_of_the_design():
    before_and_after = {"before_rollout", "after_rollout", "before_step", "after_step", "after_publish", "after_checkpoint"}
    assert set(MOMENTS) == {"on_start", "on_failure", "on_end"} | before_and_after


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("on_strat", r"hook 'mine': on_strat is no moment\. Did you mean 'on_start'\? Moments: on_start, before_rollout"),
        ("after_publsh", r"after_publsh is no moment\. Did you mean 'after_publish'\?"),
        ("before_lunch", r"before_lunch is no moment\."),
        ("started", r"hook 'mine' has none of the methods on_start, .*; it would never be called"),
    ],
)
def test_a_method_that_would_never_be_called_is_an_error(moment, expected):
    with pytest.raises(PluginError, match=expected):
        Hooks({"mine": recorder([], "mine", moment)})


def test_helpers_and_attributes_of_a_hook_are_its_own_business():
    hook = recorder([], "mine", "on_end", "format")
    hook.on_color = "red"  # no method
    assert Hooks({"mine": hook}).hooks == {"mine": hook}


async def test_an_error_of_a_hook_is_not_swallowed():
    class Broken:
        def on_end(self, loop):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await Hooks({"broken": Broken()}).fire("on_end", None)
