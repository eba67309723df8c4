"""Trainers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .engine import WeightSource

if TYPE_CHECKING:
    from ..batch import Batch


@dataclass(frozen=True)
class StepReport:
    """What one call of ``Trainer.step`` did.

    Attributes:
        metrics: By name: loss, grad_norm, lr, entropy, clip_fraction, mismatch …
        optimizer_steps: How many optimizer steps were taken.
        columns: Packed columns [N] of the batch that the step had to compute anyway; they are written with the trajectories. A step of
            one optimizer step knows ``old_logprobs`` of the trained rows.
    """

    metrics: dict[str, float]
    optimizer_steps: int
    columns: dict[str, np.ndarray] = field(default_factory=dict)


class Trainer(WeightSource, Protocol):
    """Holds a model's weights and optimizer. One call at a time.

    The object is in the run's process; the weights may be elsewhere (ranks of a cluster).
    """

    version: int
    """Version of the weights it holds; set by the loop after each publish."""

    async def start(self) -> None:
        """Get ready: start ranks, load the model. Called once, before anything but ``close``."""
        ...

    async def annotate(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """The batch with the columns added that this model is asked for (``old_logprobs``, ``ref_logprobs``, ``values`` …), rolled."""
        ...

    async def step(self, batch: Batch) -> StepReport:
        """Train on ``batch.optimizer_steps()`` in order.

        Raises:
            DataError: A token id is outside the vocabulary (names the sample).
            StepRefused: Loss or gradient is not finite, or a gate is out of bounds, before anything was changed by this call.
            RunError: The same at a later optimizer step of the batch; the weights are those before that optimizer step.
        """
        ...

    async def save(self, directory: Path) -> None:
        """Write everything ``load`` needs to go on exactly (weights, optimizer, schedule) into an empty directory."""
        ...

    async def load(self, directory: Path) -> None:
        """Go on from what ``save`` wrote. Raises CheckpointError when it does not fit."""
        ...

    async def close(self) -> None:
        """Give memory and processes back, even if ``start`` failed or was never called."""
        ...
