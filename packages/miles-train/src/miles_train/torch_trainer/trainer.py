"""`trainer: torch` in one process, a thread of the run's. Over ranks it is ``spread.SpreadTorchTrainer``.

Renormalisation over a recorded support and attachments are not here yet; samples that need one of them are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from miles_core.batch import Batch
from miles_core.protocols import BuildContext

from ..driver import Driver, Gradients
from ..plugins import TorchTrainerConfig
from ..routing import load_routing
from ..steps import load_checked
from . import checkpoint
from .model import compute_dtype
from .optimizer import MasterAdamW
from .passes import Passes, build_model

P = ParamSpec("P")
R = TypeVar("R")


class TorchTrainer(Driver):
    """A Hugging Face model that is trained, or only asked for columns (no losses in its context). Critics and reward models have a
    scalar head, all others are language models.

    Heavy work runs in one thread of the trainer's own, so that the event loop stays alive and calls wait for each other.

    Attributes:
        model: The model.
    """

    name: ClassVar[str] = "torch"

    def __init__(self, config: TorchTrainerConfig, context: BuildContext) -> None:
        device = torch.device(context.device)
        dtype = compute_dtype(config.dtype, device)
        super().__init__(config, context, dtype=str(dtype).removeprefix("torch."), skips=config.skip_zero_advantages)
        self.model = build_model(config, context, dtype, device, bool(context.losses))
        self._passes = Passes(self.model, context.losses, context.aggregation, config.micro_batch_tokens)
        self._optimizer = MasterAdamW(self.model.hf, self.model.masters(), config) if context.losses else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"trainer-{context.model}")

    async def start(self) -> None:
        """Ready as it is built."""

    def gives(self) -> frozenset[str]:
        """See ``Driver``."""
        return self.model.gives

    async def load_columns(self, batch: Batch) -> Batch:
        """See ``Driver``."""
        return await self._in_thread(self._load_columns, batch)

    def _load_columns(self, batch: Batch) -> Batch:
        batch = load_checked(batch, self.model.reads, self.model.unsupported, self.model.vocab_size, self.name)
        return load_routing(batch, self.model.replay.shape) if self.model.replay else batch

    async def outputs(self, batch: Batch, *, own_routing: bool = False) -> np.ndarray:
        """See ``Driver``."""
        return await self._in_thread(self._passes.outputs, batch, own_routing=own_routing)

    async def gradients(self, part: Batch, *, once: bool) -> Gradients:
        """See ``Driver``."""
        return await self._in_thread(self._gradients, part, once)

    def _gradients(self, part: Batch, once: bool) -> Gradients:
        optimizer = self._trained()
        optimizer.zero_grad()
        found = self._passes.gradients(part, once=once)
        if found.complaint is not None:
            raise found.complaint
        return Gradients(found.metrics, float(optimizer.gradient_norm()), found.logprobs, found.routing)

    async def apply(self, lr: float, norm: float) -> None:
        """See ``Driver``."""
        await self._in_thread(self._apply, lr, norm)

    def _apply(self, lr: float, norm: float) -> None:
        optimizer = self._trained()
        optimizer.step(lr, torch.tensor(norm, device=self.model.device), self.config.max_grad_norm)
        optimizer.zero_grad()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name as in the exported checkpoint, detached tensor in the compute dtype), tied weights once."""
        return self.model.named_weights()

    def share_memory(self, memory: Mapping[str, Tensor]) -> None:
        """See SharesMemory."""
        self.model.share_memory(memory)

    async def save(self, directory: Path) -> None:
        """Write master weights, AdamW's state and counters as safetensors and JSON."""
        self.check_trained()
        await self._in_thread(self._save, directory)

    def _save(self, directory: Path) -> None:
        checkpoint.write_state(directory, checkpoint.state_of(self._trained(), self.counters))

    async def load(self, directory: Path) -> None:
        """Go on from what ``save`` wrote: on one thread, to the bit. CheckpointError where it does not fit; nothing has changed then."""
        self.check_trained()
        self.counters = await self._in_thread(self._load, directory)

    def _load(self, directory: Path) -> dict[str, int]:
        state = checkpoint.read_state(directory, self._trained())
        checkpoint.put_back(self._trained(), state)
        return state.counters

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face directory: config, weights in the compute dtype, the starting model's tokenizer files."""
        assert self.context.model_path is not None
        await self._in_thread(checkpoint.export, directory, self.model, self.context.model_path)

    async def close(self) -> None:
        """Give the model's memory and the thread back; the trainer cannot be used afterwards."""
        await asyncio.to_thread(self._worker.shutdown)  # a call that was given up may still be running
        del self.model, self._optimizer, self._passes
        if self.context.device == "cuda":
            torch.cuda.empty_cache()

    async def _in_thread(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._worker, partial(function, *args, **kwargs))

    def _trained(self) -> MasterAdamW:
        assert self._optimizer is not None, "asked only where there is a loss"
        return self._optimizer
