"""Clusters that a recipe may name, and their options. No torch here."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..plugins import PluginConfig


class ProcessesConfig(PluginConfig):
    """Ranks are processes on this machine."""

    point: ClassVar[str] = "cluster"
    target: ClassVar[str] = "miles_core.clusters.processes:Processes"

    threads: int | None = Field(None, ge=1)
    """Threads that a rank computes with. None: as OMP_NUM_THREADS says, else the cores of this machine divided by a
    model's ranks."""
