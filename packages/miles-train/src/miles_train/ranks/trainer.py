"""The controller's side of a model that is spread over the ranks of the run's cluster: it cuts batches, sends each rank its own, and puts
together what they say."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from miles_core import errors
from miles_core.batch import Batch
from miles_core.columns import COLUMNS
from miles_core.config import Deadlines
from miles_core.errors import ConfigError, RunError
from miles_core.plan import units_of
from miles_core.plugins import PluginConfig
from miles_core.protocols import BuildContext, Ranks

from ..driver import Driver, Gradients
from ..plugins import AdamWTrainerConfig
from .layout import Layout
from .messages import Bucket, RankGradients, RankOptions
from .sharding import Cut

BEFORE = 0.95
"""Part of a stage's deadline that the ranks get, so that it is the error which names the rank that comes."""


class RanksTrainer(Driver):
    """A model over the ranks of the run's cluster, trained, or only asked for columns (no losses in its context).

    Attributes:
        layout: Over how many ranks the model is spread, and how.
        bucket_bytes: Weights are given away in buckets of about so many bytes.
    """

    worker: ClassVar[str]
    """``module:Class`` of a rank; what it is asked is what is called here."""

    def __init__(self, config: AdamWTrainerConfig, context: BuildContext, layout: Layout, *, dtype: str, skips: bool) -> None:
        super().__init__(config, context, dtype=dtype, skips=skips)
        if context.losses and context.stage is None:
            raise ConfigError(
                f"trainer {self.name!r} builds its losses on every rank, from the stage's configuration; it was given no stage"
            )
        self.layout = layout
        self.bucket_bytes = 256 * 2**20
        self._deadlines: Deadlines = context.stage.deadlines if context.stage is not None else Deadlines()
        self._ranks: Ranks | None = None
        self._end = 0.0

    # ---- what a subclass says

    @abstractmethod
    def reads(self) -> Sequence[str]:
        """Batch columns that every rank gets."""

    @abstractmethod
    def cut(self, batch: Batch, units: np.ndarray) -> Cut:
        """Who gets which samples of a loaded batch; ``units``: int64 [S], samples with the same number stay together."""

    @abstractmethod
    def replays(self) -> bool:
        """Whether recorded experts are replayed, as far as that is known before the ranks have their model."""

    # ---- ranks

    async def start(self) -> None:
        """Start the ranks; each loads its part of the model.

        Raises:
            ConfigError: The run has no cluster, or a checkpoint does not hold what the model's architecture says.
            RunError: A rank died or did not get ready; says where its log is.
        """
        if self.context.cluster is None:
            raise ConfigError(f"trainer {self.name!r} runs on the ranks of a cluster, and there is none; set cluster: processes")
        seconds = BEFORE * self._deadlines.start
        self._end = time.monotonic() + seconds
        self._ranks = await self.context.cluster.start(
            self.worker,
            self.size,
            [(self._rank_options(),)] * self.size,
            name=f"trainer-{self.context.model}",
            log_dir=self.context.run_dir / "logs",
            seconds=seconds,
        )

    async def close(self) -> None:
        """End the ranks; the trainer cannot be used afterwards."""
        if self._ranks is not None:
            await self._ranks.close()

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.layout.world_size

    def begin(self) -> None:
        """From here on the ranks have as long as the loop waits for one call of this trainer, but for a little."""
        self._end = time.monotonic() + BEFORE * self._deadlines.train

    async def call(self, method: str, arguments: Sequence[tuple], what: str) -> list[Any]:
        """What each rank gives, within what is left of the deadline."""
        return await self._started().call(method, arguments, seconds=max(self._end - time.monotonic(), 0.1), what=what)

    def _started(self) -> Ranks:
        if self._ranks is None:
            raise RunError(f"the trainer of {self.context.model!r} was asked for something before it was started")
        return self._ranks

    def _rank_options(self) -> RankOptions:
        model = self.context.stage.models[self.context.model] if self.context.losses else None
        plugins: list[PluginConfig] = [*model.losses.values(), model.aggregation] if model else []
        return RankOptions(
            config=self.config,
            layout=self.layout,
            dtype=self._dtype,
            context=replace(self.context, tokenizer=None, losses={}, aggregation=None, stage=None, cluster=None),
            losses={name: loss.model_dump() for name, loss in model.losses.items()} if model else {},
            aggregation=model.aggregation.model_dump() if model else {},
            modules=_modules([inner for plugin in plugins for inner in plugin.nested()], self.name),
            columns=tuple(COLUMNS.values()),
            replay=self.replays(),
            timeout_s=self._deadlines.train,
        )

    # ---- what the step asks

    async def outputs(self, batch: Batch, *, own_routing: bool = False) -> np.ndarray:
        """See ``Driver``."""
        cut, arguments = await asyncio.to_thread(self._cut, batch, np.arange(len(batch)), ())
        return cut.gather(await self.call("annotate", [(*a, own_routing) for a in arguments], f"{len(batch)} samples to be annotated"))

    async def gradients(self, part: Batch, *, once: bool) -> Gradients:
        """See ``Driver``."""
        cut, arguments = await asyncio.to_thread(self._cut, part, units_of(part, self.unit), tuple(part.columns))
        what = f"the gradients of optimizer step {self.optimizer_steps + 1}"
        results: list[RankGradients] = await self.call("gradients", [(*a, once) for a in arguments], what)
        for kind, sentence in (r.complaint for r in results if r.complaint):
            raise getattr(errors, kind)(sentence)
        metrics: dict[str, float] = {}
        routing: Counter[str] = Counter()
        for result in results:
            routing.update(result.routing)
            for name, share in result.parts.items():
                metrics[name] = metrics.get(name, 0.0) + share
        said = [r.logprobs for r in results]
        return Gradients(metrics, results[0].norm, cut.gather(said) if any(x is not None for x in said) else None, routing)

    async def apply(self, lr: float, norm: float) -> None:
        """See ``Driver``."""
        await self.call("step", [(lr, norm)] * self.size, "an optimizer step")

    def _cut(self, batch: Batch, units: np.ndarray, last: Sequence[str]) -> tuple[Cut, list[tuple]]:
        """A loaded batch in micro-batches, and what each rank is sent of it."""
        cut = self.cut(batch, units)
        return cut, list(cut.for_ranks(self.reads(), last))

    # ---- weights and checkpoints

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name as in the exported checkpoint, tensor in the compute dtype), tied weights once. To be taken from in a thread."""
        for bucket in self.buckets(self._deadlines.publish):
            yield from bucket

    def buckets(self, seconds: float) -> Iterator[list[tuple[str, Tensor]]]:
        """The same, bucket by bucket; ``seconds`` is the deadline of each."""
        arguments = [(self.bucket_bytes,)] * self.size
        for bucket in self._started().stream("weights", arguments, seconds=BEFORE * seconds, what="the next bucket of weights"):
            yield _tensors(bucket)

    async def save(self, directory: Path) -> None:
        """Write master weights, AdamW's state and counters as safetensors and JSON, into a directory that all ranks reach."""
        self.check_trained()
        self.begin()
        directory.mkdir(parents=True, exist_ok=True)
        await self.call("save", [(directory.resolve(), self.counters)] * self.size, f"the checkpoint in {directory}")

    async def load(self, directory: Path) -> None:
        """Go on from what ``save`` wrote, to the bit on as many ranks. CheckpointError where it does not fit: nothing has changed."""
        self.check_trained()
        self.begin()
        headers = await self.call("load", [(directory.resolve(),)] * self.size, f"the checkpoint in {directory} to be read")
        self.counters = headers[0]


def _tensors(bucket: Bucket) -> list[tuple[str, Tensor]]:
    return [(name, torch.from_numpy(raw).view(getattr(torch, dtype)).view(shape)) for name, dtype, shape, raw in bucket]


def _modules(plugins: Sequence[PluginConfig], trainer: str) -> list[str]:
    """Modules that ranks must import first, because plug-ins are decorated there: those that a name without a colon may stand for."""
    modules = []
    for plugin in plugins:
        module = getattr(type(plugin), "plain", type(plugin)).__module__
        if ":" in plugin.use:
            continue
        if module == "__main__":
            raise ConfigError(
                f"{plugin.point} {plugin.use!r} is decorated in the script that was started, which the ranks of trainer {trainer!r} cannot "
                "import; move it into a module beside it and name it module:attribute"
            )
        modules.append(module)
    return sorted(set(modules))
