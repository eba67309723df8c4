"""Options of the KL estimators: they have none."""

from __future__ import annotations

from typing import ClassVar

from ..plugins import PluginConfig


class K1(PluginConfig):
    """``d = log π − log π_ref``: unbiased, may be negative. The one for the reward."""

    point: ClassVar[str] = "kl"
    target: ClassVar[str] = "miles_core.algorithms.kl:k1"


class K2(PluginConfig):
    """``d² / 2``: as a loss its gradient is the divergence's."""

    point: ClassVar[str] = "kl"
    target: ClassVar[str] = "miles_core.algorithms.kl:k2"


class K3(PluginConfig):
    """``exp(−d) − 1 + d``: unbiased, low variance, never negative."""

    point: ClassVar[str] = "kl"
    target: ClassVar[str] = "miles_core.algorithms.kl:k3"


class Abs(PluginConfig):
    """``|d|``: every token counts alike, however far it drifted."""

    point: ClassVar[str] = "kl"
    target: ClassVar[str] = "miles_core.algorithms.kl:absolute"


class LowVariance(PluginConfig):
    """k3 with d held within ±20, against overflow."""

    point: ClassVar[str] = "kl"
    target: ClassVar[str] = "miles_core.algorithms.kl:low_variance"
