"""Whether an object keeps a plug-point's Protocol, said in a sentence that names what is missing."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from .errors import PluginError


def check_protocol(obj: Any, protocol: type, point: str, origin: str) -> None:
    """Raise a PluginError that says what is missing if ``obj`` does not keep the point's Protocol.

    Methods must exist, take the Protocol's arguments as it does (by position, or by name only), and be async where the Protocol is
    (rewards and rollouts may be either; the plain ones are called in threads).
    """
    members = {
        n: m
        for c in protocol.__mro__
        for n, m in vars(c).items()
        if inspect.isfunction(m) and c.__module__.startswith("miles_core.protocols.")
    }
    for name, wanted in members.items():
        if name.startswith("_") and name not in ("__call__", "__len__", "__getitem__"):
            continue
        arguments = [p for p in inspect.signature(wanted).parameters.values() if p.name != "self"]
        signature = f"{'async ' if inspect.iscoroutinefunction(wanted) else ''}{name}({', '.join(p.name for p in arguments)})"
        method = obj if name == "__call__" and not inspect.isclass(obj) else getattr(obj, name, None)
        if not callable(method):
            raise PluginError(f"{origin} has no {signature}, which every {point} has. Add it; see miles_core.protocols.")
        function = method.func if isinstance(method, functools.partial) else method
        if not inspect.isroutine(function) and not inspect.isclass(function):
            function = function.__call__
        if inspect.iscoroutinefunction(function) != inspect.iscoroutinefunction(wanted) and point not in ("reward", "rollout"):
            raise PluginError(
                f"{origin}: {name} must be {'async' if inspect.iscoroutinefunction(wanted) else 'a plain function'}: {signature}"
            )
        unbound = inspect.isclass(obj)
        try:
            by_name = {p.name: None for p in arguments if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
            by_position = [None for p in arguments if p.kind is not p.KEYWORD_ONLY]
            inspect.signature(method).bind(*([None] if unbound else []), *by_position, **by_name)
        except TypeError as error:
            raise PluginError(f"{origin}: {name}{inspect.signature(method)} cannot be called as {signature}: {error}") from None
        except ValueError:
            continue  # built-in without a signature
