"""What every trainer does before and after the optimizer steps of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from miles_core.batch import Batch
from miles_core.errors import DataError, StepRefused


def load_checked(batch: Batch, reads: Sequence[str], unsupported: Sequence[str], vocab_size: int, trainer: str) -> Batch:
    """The batch with the columns that a model reads.

    Raises:
        DataError: A sample has a column without which the numbers would be wrong and which the trainer cannot use, or a token id is
            outside the vocabulary; names the sample.
    """
    for ref in batch.refs:
        for name in unsupported:
            if name in ref.get().columns:
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
