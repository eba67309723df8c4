"""Hooks: an object with methods named after moments of the loop; each is called with the Loop, sync or async."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .errors import PluginError
from .plugin_finding import did_you_mean

MOMENTS = (
    "on_start",
    "before_rollout",
    "after_rollout",
    "before_step",
    "after_step",
    "after_publish",
    "after_checkpoint",
    "on_failure",
    "on_end",
)


class Hooks:
    """The hooks of a run, checked: a method that looks like a moment but is none is an error, not silence."""

    def __init__(self, hooks: Mapping[str, Any]):
        self.hooks = hooks
        for name, hook in hooks.items():
            methods = [m for m in dir(hook) if m.startswith(("on_", "before_", "after_")) and callable(getattr(hook, m))]
            for method in methods:
                if method not in MOMENTS:
                    hint = did_you_mean(method, list(MOMENTS))
                    raise PluginError(f"hook {name!r}: {method} is no moment.{hint} Moments: {', '.join(MOMENTS)}")
            if not methods:
                raise PluginError(f"hook {name!r} has none of the methods {', '.join(MOMENTS)}; it would never be called")

    async def fire(self, moment: str, loop: Any) -> None:
        """Call every hook that has this moment, in the order of the recipe."""
        for hook in self.hooks.values():
            method = getattr(hook, moment, None)
            if method is not None:
                outcome = method(loop)
                if inspect.isawaitable(outcome):
                    await outcome
