"""A micro-batch's exact share of an optimizer step's loss and metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.algorithms.segments import SegmentOps
from miles_core.batch import Batch
from miles_core.errors import PluginError
from miles_core.protocols import Aggregation, LossInputs, LossTerm


def shares(
    micro: Batch,
    outputs: Mapping[str, Tensor],
    losses: Mapping[str, LossTerm],
    aggregation: Aggregation,
    *,
    once: bool,
    cp: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor], str | None]:
    """The micro-batch's part of the step's loss, and of each metric.

    All terms are computed, also after one that is not finite: ranks that share the micro-batch must go the same way.

    Args:
        micro: Some samples of an optimizer step, with that step's denominators.
        outputs: [N] each, what the model gives by name (``LossInputs.outputs``).
        losses: The terms by name; the sum of coefficient · term is trained on.
        aggregation: Weight of each row in the step's loss.
        once: Whether it is the batch's only optimizer step: ``old_logprobs`` that nobody annotated are then what this pass says.
        cp: Process group of the ranks that hold other rows of the same samples.

    Returns:
        A differentiable scalar, and detached scalars by name: ``loss``, ``loss/<term>`` (without its coefficient), means of the
        outputs other than log-probabilities (``entropy``, ``values``), and the terms' own metrics.
        Added up over the micro-batches of a step, and the ranks of ``cp``, they are the step's loss and means over its trained tokens.
        Last, what is wrong with the loss: which term is not finite and what sample that came from; None if all are.

    Raises:
        PluginError: A term's loss is not one number a row, or two terms report a metric of the same name.
    """
    device = next(iter(outputs.values())).device
    columns = micro.tensors(device)
    if once and "logprobs" in outputs:
        columns.setdefault("old_logprobs", outputs["logprobs"].detach())
    ops = SegmentOps.of(micro, device, cp=cp)
    complaint = None
    inputs = LossInputs(outputs, columns, ops)
    weights = aggregation(ops)
    total = next(iter(outputs.values())).new_zeros(())
    parts = {name: _mean(ops, x) for name, x in outputs.items() if name != "logprobs"}
    for term, loss in losses.items():
        given = loss.function(inputs)
        if given.loss.shape != ops.mask.shape:
            raise PluginError(f"loss {term!r} gave {list(given.loss.shape)}; expected a loss for each row, {list(ops.mask.shape)}")
        share = ops.share(given.loss, weights)
        if complaint is None and not torch.isfinite(share):
            complaint = f"loss {term!r} is {float(share.detach())}{_origin(micro, ops, given.loss * weights)}"
        total = total + loss.coefficient * share
        parts[f"loss/{term}"] = share.detach()
        for name, values in given.metrics.items():
            if name in parts or name == "loss":
                raise PluginError(f"loss {term!r} reports the metric {name!r}, which is reported already; rename it")
            parts[name] = _mean(ops, values)
    return total, parts | {"loss": total.detach()}, complaint


def _mean(ops: SegmentOps, values: Tensor) -> Tensor:
    """This part's share of a mean over the step's trained tokens."""
    values = values.detach()
    return ops.share(values, torch.ones_like(values)) / ops.tokens


def _origin(micro: Batch, ops: SegmentOps, rows: Tensor) -> str:
    """Which sample brought a number that is not finite, if it was one."""
    bad = (ops.mask & ~rows.isfinite()).nonzero().flatten()
    return f" from sample {micro.refs[int(ops.segment[bad[0]])].id}" if len(bad) else ", though each row's is finite"
