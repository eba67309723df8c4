"""A rank of ``trainer: megatron``: one part of the model, and what the controller can ask of it. All ranks are asked at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from miles_core.protocols import Place

from ..ranks.messages import Bucket, Micro, RankGradients, RankOptions, Values
from ..ranks.worker import RankWorker, as_message
from . import model as models
from . import weights
from .checkpoint import apply_part, read_header, read_part, save_part, write_header
from .optimizer import ShardedAdamW
from .replay import MegatronReplay
from .specs import model_spec, read_config
from .steps import Steps


class Worker(RankWorker):
    """See the module. Every public method is called on all ranks at the same time."""

    def __init__(self, place: Place, options: RankOptions) -> None:
        logging.getLogger("megatron").setLevel(logging.WARNING)
        super().__init__(place, options)
        models.initialize(options.layout, timeout_s=options.timeout_s)
        path, config = options.context.model_path, options.config
        assert path is not None
        self._model = models.build(
            path,
            model_spec(read_config(path)),
            options.layout,
            getattr(torch, options.dtype),
            replay=options.replay,
            recompute=config.recompute,
        )
        self._optimizer = ShardedAdamW(self._model, config, path) if options.losses else None
        module = self._optimizer.module if self._optimizer else self._model
        self._steps = Steps(self._model, module, MegatronReplay(self._model) if options.replay else None, self.device)

    def annotate(self, micros: list[Micro], own_routing: bool) -> Values | None:
        """See ``Steps.annotate``."""
        return self._steps.annotate(micros, own_routing=own_routing)

    def gradients(self, micros: list[Micro], once: bool) -> RankGradients:
        """The gradient of an optimizer step, accumulated and added up over ranks; it stays here until ``step`` or the next call."""
        optimizer = self._trained()
        assert self.aggregation is not None
        optimizer.zero_grad()
        result = self._steps.gradients(micros, self.losses, self.aggregation, once=once)
        result.norm = optimizer.gradient_norm()
        return result

    def step(self, lr: float, norm: float) -> None:
        """One optimizer step with the gradient that is here."""
        self._trained().step(lr, norm)
        self._trained().zero_grad()

    def weights(self, max_bytes: int) -> Iterator[Bucket]:
        """The model's weights bucket by bucket, on rank 0; elsewhere as many empty buckets."""
        for bucket in weights.export(self._model, max_bytes):
            yield as_message(bucket)

    def save(self, directory: Path, counters: Mapping[str, int]) -> None:
        """Write this rank's part; rank 0 the header, once all parts are there."""
        self.agreed(lambda: save_part(directory, self._trained(), self.options.layout, self.rank))
        self.agreed(lambda: write_header(directory, self.options.layout, counters) if self.rank == 0 else None)

    def load(self, directory: Path) -> dict[str, int]:
        """Go on from what ``save`` wrote, on all ranks or on none. The counters."""
        layout, optimizer = self.options.layout, self._trained()
        header = self.agreed(lambda: read_header(directory, layout))
        masters, state = self.agreed(lambda: read_part(directory, optimizer, layout, self.rank))
        apply_part(optimizer, masters, state)
        return header

    def _trained(self) -> ShardedAdamW:
        assert self._optimizer is not None, "the controller asks only models that have a loss"
        return self._optimizer
