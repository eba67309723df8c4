"""What the controller and the ranks say to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles_core.batch import Batch
from miles_core.columns import ColumnSpec
from miles_core.protocols import BuildContext
from miles_core.sample import Sample

from ..plugins import AdamWTrainerConfig
from .layout import Layout

READS = ("tokens", "targets", "positions", "temperatures")
"""Batch columns that every rank reads."""

Values = list[np.ndarray | None]
"""For each micro-batch float32 [N_local] over the rows that the rank held, None for dummies."""

Bucket = list[tuple[str, str, tuple[int, ...], np.ndarray]]
"""(Hugging Face name, dtype, shape, bytes) of some weights."""


@dataclass(frozen=True)
class RankOptions:
    """What a rank is built from.

    Attributes:
        config: The trainer's options.
        layout: Its sizes.
        dtype: Of the forward pass.
        context: What plug-ins are built with: names and paths, no objects.
        losses: Options of the loss terms by name; none where the model is not trained.
        aggregation: Options of the aggregation.
        modules: Imported first, because they decorate plug-ins.
        columns: All that samples may have, those that plug-ins declared included.
        replay: See ``RanksTrainer.replays``.
        timeout_s: Deadline of a wait for other ranks.
    """

    config: AdamWTrainerConfig
    layout: Layout
    dtype: str
    context: BuildContext
    losses: Mapping[str, Mapping[str, Any]]
    aggregation: Mapping[str, Any]
    modules: Sequence[str]
    columns: Sequence[ColumnSpec]
    replay: bool
    timeout_s: float


@dataclass(frozen=True)
class Elsewhere:
    """The handle of a sample whose rows a rank has got: the rest of it stayed with the controller."""

    def get(self) -> Sample:
        """Never."""
        raise RuntimeError("a rank asked for a whole sample; it has only the columns that it was sent")


@dataclass(frozen=True)
class Micro:
    """A micro-batch as a rank gets it.

    Attributes:
        batch: Whole samples with the columns the rank needs, and the denominators of the optimizer step.
        real: Whether it is one, not a dummy.
    """

    batch: Batch
    real: bool


@dataclass
class RankGradients:
    """What a rank has to say of an optimizer step's gradients.

    Attributes:
        parts: This rank's shares of loss and metrics by name; they add up over ranks. Empty on ranks that repeat another's.
        logprobs: Of the trained rows; others hold NaN. None on ranks that repeat another's.
        routing: Counts of (row, MoE layer) pairs as ``routing_metrics`` takes them; they add up over ranks.
        complaint: Name of an error class and its sentence, where the loss is not to be trained on.
        norm: L2 norm of the whole gradient.
    """

    parts: dict[str, float] = field(default_factory=dict)
    logprobs: Values | None = None
    routing: dict[str, float] = field(default_factory=dict)
    complaint: tuple[str, str] | None = None
    norm: float = 0.0
