"""Miles: protocols, the Sample, the loop, algorithms, configuration and the command line.

``import miles_core as miles`` loads numpy and pydantic and no torch. What a user's script needs is here; what a plug-in
author reads is ``miles_core.protocols``.
"""

from typing import TYPE_CHECKING, Any

from .columns import COLUMNS, Attachment, Attachments, Blob, ColumnSpec, Ragged, register_column
from .errors import ConfigError, DataError, InfrastructureFailure, MilesError, PluginError, RunError
from .plugins import POINTS, PluginConfig, decorator
from .protocols import Observation, Passage, Prompt
from .sample import Group, Sample, SampleId, SamplingSpan, Status, Turn

if TYPE_CHECKING:
    from .config import RunConfig, resolve
    from .run import Outcome, Run

__version__ = "0.1.0"

_ON_USE = {"RunConfig": "config", "resolve": "config", "Outcome": "run", "Run": "run"}
"""Names that are imported when they are first used: a plug-in needs the schema, not the configuration tree and the loop."""


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        raise AttributeError(f"module 'miles_core' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_ON_USE[name]}", __name__), name)


data_source = decorator("data_source")
rollout = decorator("rollout")
generate = decorator("generate")
environment = decorator("environment")
reward = decorator("reward")
group_filter = decorator("group_filter")
sample_filter = decorator("sample_filter")
advantage = decorator("advantage")
loss = decorator("loss")
aggregation = decorator("aggregation")
tracker = decorator("tracker")
hook = decorator("hook")

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
    "sample_filter",
    "tracker",
]
