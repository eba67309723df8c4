"""Options of the aggregations."""

from __future__ import annotations

from typing import ClassVar

from ..plugins import PluginConfig


class TokenMean(PluginConfig):
    """Every trained token of the optimizer step weighs the same."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:token_mean"


class SequenceMean(PluginConfig):
    """Every trained sequence of the optimizer step weighs the same, as the mean over its tokens."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:sequence_mean"
