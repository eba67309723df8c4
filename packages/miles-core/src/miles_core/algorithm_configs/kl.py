"""Options of the KL estimators: they have none."""

from __future__ import annotations

from typing import ClassVar

from ..plugins import PluginConfig


class K1(PluginConfig):
    """``log π − log π_ref``: unbiased, may be negative."""

    point: ClassVar[str] = "kl"
    target: ClassVar[str] = "miles_core.algorithms.kl:k1"
