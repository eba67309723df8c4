"""Miles: protocols, the Sample, the loop, algorithms, configuration and the command line.

``import miles_core as miles`` loads numpy and pydantic and no torch. What a user's script needs is here; what a plug-in
author reads is ``miles_core.protocols``.
"""

from typing import TYPE_CHECKING, Any

from .columns import COLUMNS, Attachment, Attachments, Blob, ColumnSpec, Ragged, register_column
from .errors import ConfigError, DataError, InfrastructureFailure, MilesError, PluginError, RunError
from .sample import Group, Sample, SampleId, SamplingSpan, Status, Turn

if TYPE_CHECKING:
    from .config import RunConfig, resolve
    from .plugins import POINTS, PluginConfig
    from .protocols import Observation, Passage, Prompt, Score
    from .pytorch_loop import run, update
    from .runner import Outcome, Run

    data_source: Any
    rollout: Any
    generate: Any
    environment: Any
    reward: Any
    group_filter: Any
    sample_filter: Any
    advantage: Any
    loss: Any
    aggregation: Any
    tracker: Any
    hook: Any

__version__ = "0.1.0"

_MODULES = {
    "config": ("RunConfig", "resolve"),
    "plugins": ("POINTS", "PluginConfig"),
    "protocols": ("Observation", "Passage", "Prompt", "Score"),
    "runner": ("Outcome", "Run"),
    "pytorch_loop": ("run", "update"),
}
"""Names that are imported when they are first used: who reads samples needs numpy, not the configuration tree and the loop."""

_DECORATORS = ("data_source", "rollout", "generate", "environment", "reward", "group_filter", "sample_filter")
_DECORATORS += ("advantage", "loss", "aggregation", "tracker", "hook")
"""Plug-points whose plug-ins people write as a function or a small class."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    if name in _DECORATORS:
        from .plugin_finding import decorator

        return decorator(name)
    raise AttributeError(f"module 'miles_core' has no attribute {name!r}")


__all__ = [
    "COLUMNS",
    "POINTS",
    "Attachment",
    "Attachments",
    "Blob",
    "ColumnSpec",
    "ConfigError",
    "DataError",
    "Group",
    "InfrastructureFailure",
    "MilesError",
    "Observation",
    "Outcome",
    "Passage",
    "PluginConfig",
    "PluginError",
    "Prompt",
    "Ragged",
    "Run",
    "RunConfig",
    "RunError",
    "Sample",
    "SampleId",
    "SamplingSpan",
    "Score",
    "Status",
    "Turn",
    "advantage",
    "aggregation",
    "data_source",
    "environment",
    "generate",
    "group_filter",
    "hook",
    "loss",
    "register_column",
    "resolve",
    "reward",
    "rollout",
    "run",
    "sample_filter",
    "tracker",
    "update",
]
