"""A micro-batch's exact share of an optimizer step's loss and metrics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from miles_core.algorithms.segments import SegmentOps
from miles_core.batch import Batch
from miles_core.errors import PluginError, RunError
from miles_core.protocols import Aggregation, Loss, LossInputs


def spread(values: Tensor, rows: np.ndarray, batch: Batch) -> Tensor:
    """Values [R] of some rows → [N], 0 elsewhere. No gradient comes back from elsewhere, not even the NaN of 0 · NaN."""
    index = torch.from_numpy(rows).to(values.device)
    return values.new_zeros(batch.n_rows).index_copy(0, index, values)


def shares(
    micro: Batch, logprobs: Tensor, entropy: Tensor, losses: Mapping[str, Loss], aggregation: Aggregation
) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batch's part of the step's loss, and of each metric.

    Args:
        micro: Some samples of an optimizer step, with that step's denominators.
        logprobs, entropy: [N], of the predicted tokens.
        losses: The terms by name; their sum is trained on.
        aggregation: Weight of each row in the step's loss.

    Returns:
        A differentiable scalar, and detached scalars by name: ``loss``, ``loss/<term>``, ``entropy`` and the terms' own metrics.
        Added up over the micro-batches of a step they are the step's loss and means over its trained tokens.

    Raises:
        PluginError: A term's loss is not one number a row, or two terms report a metric of the same name.
        RunError: A term is not finite; names the sample it came from.
    """
    device = logprobs.device
    columns = {n: torch.from_numpy(c).to(device) for n, c in micro.columns.items() if isinstance(c, np.ndarray)}
    ops = SegmentOps.of(micro, device)
    inputs = LossInputs(logprobs, entropy, columns, ops)
    weights = aggregation(ops)
    total = logprobs.new_zeros(())
    parts = {"entropy": _mean(ops, entropy)}
    for term, loss in losses.items():
        outputs = loss(inputs)
        if outputs.loss.shape != ops.mask.shape:
            raise PluginError(f"loss {term!r} gave {list(outputs.loss.shape)}; expected a loss for each row, {list(ops.mask.shape)}")
        share = ops.share(outputs.loss, weights)
        if not torch.isfinite(share):
            raise RunError(f"loss {term!r} is {float(share.detach())}{_origin(micro, ops, outputs.loss * weights)}")
        total = total + share
        parts[f"loss/{term}"] = share.detach()
        for name, values in outputs.metrics.items():
            if name in parts or name == "loss":
                raise PluginError(f"loss {term!r} reports the metric {name!r}, which is reported already; rename it")
            parts[name] = _mean(ops, values)
    return total, parts | {"loss": total.detach()}


def _mean(ops: SegmentOps, values: Tensor) -> Tensor:
    """This part's share of a mean over the step's trained tokens."""
    return ops.sum(values.detach(), "global") / ops.tokens


def _origin(micro: Batch, ops: SegmentOps, rows: Tensor) -> str:
    """Which sample brought a number that is not finite, if it was one."""
    bad = (ops.mask & ~rows.isfinite()).nonzero().flatten()
    return f" from sample {micro.refs[int(ops.segment[bad[0]])].id}" if len(bad) else ", though each row's is finite"
