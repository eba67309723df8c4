"""A rank of ``trainer: torch``: samples of its own and a part of the weights, and what the controller can ask of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from miles_core.errors import class_name
from miles_core.protocols import Place

from ..plugins import TorchTrainerConfig
from ..ranks.messages import Bucket, Micro, RankGradients, RankOptions, Values
from ..ranks.worker import RankWorker, as_message
from ..routing import MoeShape
from . import checkpoint
from .optimizer import MasterAdamW
from .passes import Passes, build_model
from .sharded import Sharded


class Worker(RankWorker):
    """See the module. Every public method is called on all ranks at the same time."""

    def __init__(self, place: Place, options: RankOptions) -> None:
        super().__init__(place, options)
        config = cast("TorchTrainerConfig", options.config)
        on_cpu = self.device.type == "cpu"
        self._model = self.agreed(lambda: build_model(config, options.context, torch.float32, torch.device("cpu"), bool(options.losses)))
        self._sharded = Sharded(self._model, getattr(torch, options.dtype), self.device, gathers_once=on_cpu)
        self._passes = Passes(self._model, self.losses, self.aggregation, config.micro_batch_tokens, self._sharded)
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = MasterAdamW(self._model.hf, self._model.masters(), config) if options.losses else None

    def facts(self) -> tuple[int, MoeShape | None]:
        """What the controller checks batches by: the size of the vocabulary, and what routing is replayed."""
        return self._model.vocab_size, self._model.replay.shape if self._model.replay else None

    def annotate(self, micros: list[Micro], own_routing: bool) -> Values:
        """See ``Passes.outputs``."""
        (micro,) = micros
        column = self._passes.outputs(micro.batch, own_routing=own_routing, real=micro.real)
        return [column if micro.real else None]

    def gradients(self, micros: list[Micro], once: bool) -> RankGradients:
        """The gradient of an optimizer step, added up over ranks; it stays here until ``step`` or the next call."""
        (micro,) = micros
        optimizer = self._trained()
        optimizer.zero_grad()
        found = self._passes.gradients(micro.batch, once=once, real=micro.real)
        said: Values | None = None if found.logprobs is None or not micro.real else [found.logprobs]
        complaint = None if found.complaint is None else (class_name(found.complaint), str(found.complaint))
        return RankGradients(found.metrics, said, found.routing, complaint, float(optimizer.gradient_norm()))

    def step(self, lr: float, norm: float) -> None:
        """One optimizer step with the gradient that is here."""
        self._trained().step(lr, torch.tensor(norm, device=self.device), self._max_grad_norm)
        self._trained().zero_grad()

    def weights(self, max_bytes: int) -> Iterator[Bucket]:
        """The model's weights bucket by bucket, on rank 0."""
        bucket: list[tuple[str, Tensor]] = []
        for name, tensor in self._sharded.named_weights():
            if bucket and sum(t.nbytes for _, t in bucket) + tensor.nbytes > max_bytes:
                yield as_message(bucket)
                bucket = []
            bucket.append((name, tensor))
        if bucket:
            yield as_message(bucket)

    def save(self, directory: Path, counters: Mapping[str, int]) -> None:
        """Write the whole state, on rank 0."""
        state = checkpoint.state_of(self._trained(), counters, kept=self.rank == 0)
        self.agreed(lambda: checkpoint.write_state(directory, state) if self.rank == 0 else None)

    def load(self, directory: Path) -> dict[str, int]:
        """Go on from what ``save`` wrote, on all ranks or on none, however many wrote it. The counters."""
        state = self.agreed(lambda: checkpoint.read_state(directory, self._trained()))
        checkpoint.put_back(self._trained(), state)
        return state.counters

    def export(self, directory: Path, source: Path) -> None:
        """Write a Hugging Face directory, on rank 0."""
        whole = self._sharded.whole_weights()
        self.agreed(lambda: checkpoint.export(directory, self._model, source, whole) if self.rank == 0 else None)

    def _trained(self) -> MasterAdamW:
        assert self._optimizer is not None, "the controller asks only models that have a loss"
        return self._optimizer
