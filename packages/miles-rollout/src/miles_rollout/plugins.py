"""Engines and weight transports that a recipe may name, and their options. No torch here: `miles check` reads this module."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from miles_core.plugins import PluginConfig


class LocalEngineConfig(PluginConfig):
    """A batched sampler in this process over any Hugging Face causal language model with full attention."""

    point: ClassVar[str] = "rollout_engine"
    target: ClassVar[str] = "miles_rollout.local.engine:LocalEngine"

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights; the trainer's compute dtype must be the same. None: float32 on a CPU, bfloat16 on a GPU."""
    max_batch: int = Field(256, gt=0)
    """Sequences that are held at a time; more requests wait. The cache takes memory for this many of the longest one."""
    max_length: int | None = Field(None, gt=1)
    """Most tokens of a sequence, context and generation together. None: as many as the model has positions."""


class InlineTransportConfig(PluginConfig):
    """Weights to engines of the same process, tensor by tensor."""

    point: ClassVar[str] = "weight_transport"
    target: ClassVar[str] = "miles_rollout.transports.inline:InlineTransport"
