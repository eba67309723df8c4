"""What every trainer does before and after the optimizer steps of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_core.batch import Batch
from miles_core.errors import DataError, StepRefused
from miles_core.plan import units_of
from miles_core.protocols import Unit


def load_checked(batch: Batch, reads: Sequence[str], unsupported: Sequence[str], vocab_size: int, trainer: str) -> Batch:
    """The batch with the columns that a model reads.

    Raises:
        DataError: A sample has a column without which the numbers would be wrong and which the trainer cannot use, or a token id is
            outside the vocabulary; names the sample.
    """
    for ref in batch.refs:
        columns = ref.get().columns
        for name in unsupported:
            if name in columns:
                raise DataError(f"sample {ref.id} has a column {name!r}, which trainer {trainer!r} cannot use yet; sample without it")
    batch = batch.load(reads)
    tokens = batch.array("tokens")
    bad = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(bad):
        ref = batch.refs[batch.segment[bad[0]]]
        raise DataError(f"sample {ref.id} holds token id {tokens[bad[0]]}; the model's ids are 0 to {vocab_size - 1}")
    return batch


def step_metrics(reports: Sequence[dict[str, float]], seconds: float) -> dict[str, float]:
    """Means over the optimizer steps of a call; ``tokens`` of all of them, ``lr`` of the last, and ``seconds/forward_backward``.

    Raises:
        StepRefused: There was none: no token is trained.
    """
    if not reports:
        raise StepRefused("the batch trains no token in any of its optimizer steps: every loss mask is empty")
    metrics = {name: float(np.mean([r[name] for r in reports])) for name in reports[0]}
    return metrics | {"tokens": float(sum(r["tokens"] for r in reports)), "lr": reports[-1]["lr"], "seconds/forward_backward": seconds}


def kept_samples(minibatch: Batch, unit: Unit, skips: bool) -> np.ndarray:
    """int64: the samples of an optimizer step that go through the model. Those that train nothing stay out.

    With ``skips`` (every loss is proportional to the advantage) so do those in whose unit all advantages are 0. If that is all of them, one
    unit stays: its gradient of 0 is what AdamW's moments and weight decay wait for.
    """
    trained = minibatch.segments.sequence_tokens > 0
    if not skips:
        return np.flatnonzero(trained)
    units = units_of(minibatch, unit)
    counts = minibatch.array("loss_mask") & (minibatch.array("advantages") != 0)
    moves = np.isin(units, units[minibatch.segment[counts]])
    if not moves.any():
        moves = units == units[np.where(trained, minibatch.lengths, np.iinfo(np.int64).max).argmin()]
    return np.flatnonzero(trained & moves)
