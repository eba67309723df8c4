"""Options of the aggregations; what they compute is told in ``miles_core.algorithms.aggregations``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..plugins import PluginConfig


class TokenMean(PluginConfig):
    """Every trained token of the optimizer step weighs the same."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:token_mean"


class TokenSum(PluginConfig):
    """The sum over the trained tokens of the optimizer step."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:token_sum"


class SequenceMean(PluginConfig):
    """Every trained sequence of the optimizer step weighs the same, as the mean over its tokens."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:sequence_mean"


class SequenceMeanTokenSum(PluginConfig):
    """The mean over the trained sequences of the optimizer step of the sum over their tokens."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:sequence_mean_token_sum"


class TrajectoryMean(PluginConfig):
    """Every trained trajectory of the optimizer step weighs the same, as the mean over its tokens, however many samples it has."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:trajectory_mean"


class Constant(PluginConfig):
    """The sum over tokens divided by the number of trained sequences and a fixed length (Dr.GRPO)."""

    point: ClassVar[str] = "aggregation"
    target: ClassVar[str] = "miles_core.algorithms.aggregations:constant"

    length: int = Field(gt=0)
    """The fixed length, in tokens: the longest answer that is allowed, usually."""
