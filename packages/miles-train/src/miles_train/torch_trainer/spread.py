"""`trainer: torch` over several ranks, the controller's side. Each holds a part of the weights and passes its own samples (``sharded``)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from miles_core.batch import Batch
from miles_core.errors import ConfigError
from miles_core.protocols import BuildContext

from ..plugins import TorchTrainerConfig
from ..ranks.layout import Layout
from ..ranks.sharding import Cut
from ..ranks.trainer import RanksTrainer
from ..routing import MoeShape, load_routing
from ..steps import load_checked
from .causal_lm import CausalLM
from .model import compute_dtype
from .passes import MODELS


class SpreadTorchTrainer(RanksTrainer):
    """What ``TorchTrainer`` is, over the ranks of the run's cluster. Numbers are the same but for the order of sums; a checkpoint is the
    same on any number of ranks, one included."""

    name: ClassVar[str] = "torch"
    worker: ClassVar[str] = "miles_train.torch_trainer.worker:Worker"

    def __init__(self, config: TorchTrainerConfig, context: BuildContext) -> None:
        if context.bitwise:
            raise ConfigError("trainer 'torch' adds gradients up over ranks; numerics: bitwise needs ranks: 1")
        dtype = str(compute_dtype(config.dtype, torch.device(context.device))).removeprefix("torch.")
        super().__init__(config, context, Layout(data=config.ranks), dtype=dtype, skips=config.skip_zero_advantages)
        self._kind = MODELS.get(context.role, CausalLM)
        self._vocab_size, self._replayed = 0, None

    async def start(self) -> None:
        """See ``RanksTrainer``."""
        await super().start()
        facts: list[tuple[int, MoeShape | None]] = await self.call("facts", [()] * self.size, "the ranks to say what their model is")
        self._vocab_size, self._replayed = facts[0]

    def gives(self) -> frozenset[str]:
        """See ``Driver``."""
        return self._kind.gives

    async def load_columns(self, batch: Batch) -> Batch:
        """See ``Driver``."""
        return await asyncio.to_thread(self._load_columns, batch)

    def _load_columns(self, batch: Batch) -> Batch:
        batch = load_checked(batch, self._kind.reads, self._kind.unsupported, self._vocab_size, self.name)
        return load_routing(batch, self._replayed) if self._replayed else batch

    def reads(self) -> Sequence[str]:
        """See ``RanksTrainer``."""
        return (*self._kind.reads, "routing") if self._replayed else self._kind.reads

    def replays(self) -> bool:
        """See ``RanksTrainer``."""
        return self._replayed is not None

    def cut(self, batch: Batch, units: np.ndarray) -> Cut:
        """See ``RanksTrainer``."""
        return Cut.whole(batch, self.layout, units)

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face directory: config, weights in the compute dtype, the starting model's tokenizer files."""
        assert self.context.model_path is not None
        self.begin()
        arguments = [(directory.resolve(), self.context.model_path.resolve())] * self.size
        await self.call("export", arguments, f"the export to {directory}")
