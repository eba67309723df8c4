"""rollout_engine: samples tokens from a policy. Here the local engine, with a meter.

In a recipe:

    models: {policy: {engine: {use: "metered:Metered", file: meter.json}}}
"""

from typing import ClassVar

from miles_rollout.plugins import LocalEngineConfig


class Metered(LocalEngineConfig):
    """The options: the local engine's, and one more. ``miles check`` reads them, so this module imports no torch; the other does."""

    target: ClassVar[str] = "metered_engine:MeteredEngine"

    file: str = "meter.json"
    """Where the meter is written, in the run's logs."""
