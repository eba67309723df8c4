"""Micro-batches through megatron-core's own schedule on one rank: log-probabilities, or gradients of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from miles_core.batch import Batch
from miles_core.errors import MilesError, RunError, class_name
from miles_core.protocols import Aggregation, LossTerm

from ..ranks.messages import Micro, RankGradients, Values
from ..torch_trainer.objective import shares
from . import inputs
from .model import PolicyModel, parallel_state
from .replay import MegatronReplay

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func


class Steps:
    """A pipeline stage and what it computes of micro-batches.

    Attributes:
        model: The bare stage.
        module: What the schedule gets: the stage, in DistributedDataParallel where it is trained.
        reports: Whether this rank's results are wanted: it is on the last stage and the first of its tensor-parallel group.
    """

    def __init__(self, model: PolicyModel, module: nn.Module, replay: MegatronReplay | None, device: torch.device) -> None:
        self.model, self.module, self._replay, self._device = model, module, replay, device
        self.last = model.coordinates.pipeline == model.layout.pipeline - 1
        self.reports = self.last and model.coordinates.tensor == 0
        self._cp: dist.ProcessGroup | None = parallel_state.get_context_parallel_group() if model.layout.context > 1 else None

    @torch.no_grad()
    def annotate(self, micros: Sequence[Micro], *, own_routing: bool) -> Values | None:
        """Log-probability of each predicted token; NaN where nothing is predicted or the token was taken greedily.

        With ``own_routing`` routers choose for themselves, whatever was recorded.
        """
        values: Values = []

        def take(micro: inputs.MicroInputs, real: bool, hidden: Tensor) -> Tensor:
            values.append(self._logprobs(micro, hidden, _sampled(micro.batch)) if real else None)
            return hidden.new_zeros(())

        self._run(micros, take, forward_only=True, replay=not own_routing)
        return values if self.reports else None

    def gradients(self, micros: Sequence[Micro], losses: Mapping[str, LossTerm], aggregation: Aggregation, *, once: bool) -> RankGradients:
        """Accumulate the gradient of the micro-batches' shares and add up the ranks'; ``norm`` is left to the optimizer.

        A loss that is not finite does not stop the rank: the others are in the middle of collectives with it.
        """
        sums: dict[str, Tensor] = {}
        result = RankGradients(logprobs=[])
        assert result.logprobs is not None
        kept = result.logprobs

        def take(micro: inputs.MicroInputs, real: bool, hidden: Tensor) -> Tensor:
            if not real:
                kept.append(None)
                return 0.0 * hidden.sum()
            rows = np.flatnonzero(micro.batch.array("loss_mask"))
            outputs = inputs.outputs(self.model, hidden, micro, rows)
            try:
                loss, parts, complaint = shares(micro.batch, outputs, losses, aggregation, once=once, cp=self._cp)
            except MilesError as error:  # the same on every rank that has this micro-batch
                result.complaint = result.complaint or (class_name(error), str(error))
                return 0.0 * hidden.sum()
            if complaint and result.complaint is None:
                result.complaint = (RunError.__name__, complaint)
            for name, part in parts.items():
                sums[name] = sums[name] + part if name in sums else part
            kept.append(_spread(outputs["logprobs"].detach(), rows))
            return loss

        result.routing = self._run(micros, take, forward_only=False)
        if not self.reports:
            return RankGradients(complaint=result.complaint, routing=result.routing)
        result.parts = {name: float(x) for name, x in sums.items()}
        return result

    def _run(
        self,
        micros: Sequence[Micro],
        take: Callable[[inputs.MicroInputs, bool, Tensor], Tensor],
        *,
        forward_only: bool,
        replay: bool = True,
    ) -> dict[str, float]:
        """All micro-batches through the schedule. ``take`` makes a loss of the last stage's hidden states. Returns routing's counts."""
        at = self.model.coordinates

        def forward_step(iterator: Iterator[Micro], module: Any) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict]]]:
            given = next(iterator)
            micro = inputs.micro_inputs(given.batch, self.model.layout, at.context, self._device)
            replayed = micro.batch if given.real and replay else None
            with self._replay.micro_batch(replayed, micro.tokens.shape[1]) if self._replay else nullcontext():
                hidden = inputs.forward(module, micro)
            none = torch.zeros((), dtype=torch.int, device=self._device)
            return hidden, lambda output: (take(micro, given.real, output), none, {})

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micros),
            model=[self.module],
            num_microbatches=len(micros),
            seq_length=1,  # shapes are told from stage to stage (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return self._replay.finish() if self._replay else {}

    def _logprobs(self, micro: inputs.MicroInputs, hidden: Tensor, rows: np.ndarray) -> np.ndarray:
        return _spread(inputs.outputs(self.model, hidden, micro, rows)["logprobs"], rows)


def _sampled(batch: Batch) -> np.ndarray:
    """int64: rows that predict a token which was not taken greedily."""
    return np.flatnonzero((batch.array("temperatures") > 0) & ~batch.ends)


def _spread(values: Tensor, rows: np.ndarray) -> np.ndarray:
    """float32 [N]: the values on ``rows``, NaN elsewhere."""
    result = np.full(len(values), np.nan, np.float32)
    result[rows] = values.float().cpu().numpy()[rows]
    return result
