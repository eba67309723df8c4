"""`trainer: megatron`: what of the controller's side is megatron's own; the rest is every trainer's over ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from miles_core.batch import Batch
from miles_core.errors import ConfigError
from miles_core.model_files import check_files
from miles_core.protocols import BuildContext

from ..plugins import MegatronTrainerConfig
from ..ranks.layout import Layout
from ..ranks.messages import READS
from ..ranks.sharding import Cut
from ..ranks.trainer import RanksTrainer
from ..routing import MoeShape, load_routing
from ..steps import load_checked
from . import checkpoint, fitting
from .specs import model_spec, read_config

UNSUPPORTED = ("support", "images", "audio")
"""Sample columns without which the numbers would be wrong; they are not used yet."""


class MegatronTrainer(RanksTrainer):
    """A language model in megatron-core over the ranks of the run's cluster, trained, or only asked for columns."""

    name: ClassVar[str] = "megatron"
    worker: ClassVar[str] = "miles_train.megatron.worker:Worker"

    def __init__(self, config: MegatronTrainerConfig, context: BuildContext) -> None:
        dtype = config.dtype or ("float32" if context.device == "cpu" else "bfloat16")
        super().__init__(config, context, Layout(**config.parallel.model_dump()), dtype=dtype, skips=False)
        self.bucket_bytes = config.bucket_bytes
        if context.role in ("critic", "reward"):
            raise ConfigError(f"trainer 'megatron' has no scalar head yet, which a {context.role} needs; use trainer: torch for it")
        assert context.model_path is not None
        check_files(context.model_path)
        hf_config = read_config(context.model_path)
        if problems := fitting.problems(self.layout, hf_config):
            raise ConfigError(f"model {context.model!r} does not fit trainer.parallel: {'; '.join(problems)}")
        spec = model_spec(hf_config)
        self._vocab_size: int = spec.model(hf_config)["vocab_size"]
        self._replayed: MoeShape | None = None
        if config.routing_replay and context.role == "policy" and (layers := spec.moe_layers(hf_config)):
            megatron = spec.transformer(hf_config)
            self._replayed = MoeShape(len(layers), megatron["moe_router_topk"], megatron["num_moe_experts"])

    def gives(self) -> frozenset[str]:
        """See ``Driver``."""
        return MegatronTrainerConfig.gives

    async def load_columns(self, batch: Batch) -> Batch:
        """See ``Driver``."""
        return await asyncio.to_thread(self._load_columns, batch)

    def _load_columns(self, batch: Batch) -> Batch:
        batch = load_checked(batch, READS, UNSUPPORTED, self._vocab_size, self.name)
        return load_routing(batch, self._replayed) if self._replayed else batch

    def reads(self) -> Sequence[str]:
        """See ``RanksTrainer``."""
        return (*READS, "routing") if self._replayed else READS

    def replays(self) -> bool:
        """See ``RanksTrainer``."""
        return self._replayed is not None

    def cut(self, batch: Batch, units: np.ndarray) -> Cut:
        """See ``RanksTrainer``."""
        return Cut.of(batch, self.layout, units, self.config.micro_batch_tokens)

    async def export(self, directory: Path) -> None:
        """Write a Hugging Face directory: config, weights in the compute dtype, the starting model's tokenizer files."""
        assert self.context.model_path is not None
        buckets = self.buckets(self._deadlines.train)
        await asyncio.to_thread(checkpoint.export, directory, buckets, self.context.model_path, self._dtype)
