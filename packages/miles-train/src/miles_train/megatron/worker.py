"""A rank of ``trainer: megatron``: one part of the model, and what the controller can ask of it. All ranks are asked at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch._dynamo  # torch's optimizers would import it when they are made: here it is done once for all ranks
import torch.distributed as dist
from safetensors import SafetensorError

from miles_core import errors
from miles_core.errors import MilesError
from miles_core.plugins import config_class, import_module
from miles_core.protocols import Aggregation, BuildContext, LossTerm, Place

from . import model as models
from . import weights
from .checkpoint import apply_part, read_header, read_part, save_part, write_header
from .messages import Bucket, Gradients, Micro, RankOptions, Values
from .optimizer import ShardedAdamW
from .replay import MegatronReplay
from .specs import model_spec, read_config
from .steps import Steps

T = TypeVar("T")


class Worker:
    """See the module. Every public method is called on all ranks at the same time."""

    def __init__(self, place: Place, options: RankOptions) -> None:
        logging.getLogger("megatron").setLevel(logging.WARNING)
        cuda = options.context.device == "cuda"
        self._device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=place.rendezvous,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=options.timeout_s),
        )
        models.initialize(options.layout, timeout_s=options.timeout_s)
        for module in options.modules:
            import_module(module)
        path, config = options.context.model_path, options.config
        assert path is not None
        self._rank, self._options = place.rank, options
        self._model = models.build(
            path,
            model_spec(read_config(path)),
            options.layout,
            getattr(torch, options.dtype),
            replay=options.replay,
            recompute=config.recompute,
        )
        self._losses = {name: _loss_term(given, options.context) for name, given in options.losses.items()}
        self._aggregation = _aggregation(options)
        self._optimizer = ShardedAdamW(self._model, config, path) if options.losses else None
        module = self._optimizer.module if self._optimizer else self._model
        self._steps = Steps(self._model, module, MegatronReplay(self._model) if options.replay else None, self._device)

    def annotate(self, micros: list[Micro], own_routing: bool = False) -> Values | None:
        """See ``Steps.annotate``."""
        return self._steps.annotate(micros, own_routing=own_routing)

    def gradients(self, micros: list[Micro]) -> Gradients:
        """The gradient of an optimizer step, accumulated and added up over ranks; it stays here until ``step`` or the next call."""
        optimizer = self._trained()
        assert self._aggregation is not None
        optimizer.zero_grad()
        result = self._steps.gradients(micros, self._losses, self._aggregation)
        result.norm = optimizer.gradient_norm()
        return result

    def step(self, lr: float, norm: float) -> None:
        """One optimizer step with the gradient that is here."""
        self._trained().step(lr, norm)
        self._trained().zero_grad()

    def weights(self, max_bytes: int) -> Iterator[Bucket]:
        """The model's weights bucket by bucket, on rank 0; elsewhere as many empty buckets."""
        for bucket in weights.export(self._model, max_bytes):
            yield [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), _bytes(t)) for name, t in bucket]

    def save(self, directory: Path, counters: Mapping[str, int]) -> None:
        """Write this rank's part; rank 0 the header, once all parts are there."""
        self._agreed(lambda: save_part(directory, self._trained(), self._options.layout, self._rank))
        self._agreed(lambda: write_header(directory, self._options.layout, counters) if self._rank == 0 else None)

    def load(self, directory: Path) -> dict[str, int]:
        """Go on from what ``save`` wrote, on all ranks or on none. The counters."""
        layout, optimizer = self._options.layout, self._trained()
        header = self._agreed(lambda: read_header(directory, layout))
        masters, state = self._agreed(lambda: read_part(directory, optimizer, layout, self._rank))
        apply_part(optimizer, masters, state)
        return header

    def _trained(self) -> ShardedAdamW:
        assert self._optimizer is not None, "the controller asks only models that have a loss"
        return self._optimizer

    def _agreed(self, work: Callable[[], T]) -> T:
        """What ``work``, which waits for no other rank, gives; if it fails on one rank, every rank raises what the first one did."""
        result, failure = None, None
        try:
            result = work()
        except MilesError as error:
            failure = (type(error).__name__, str(error))
        except (OSError, SafetensorError) as error:
            failure = ("RunError", f"rank {self._rank}: {error}")
        failures: list[tuple[str, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        for first in failures:
            if first is not None:
                raise getattr(errors, first[0])(first[1])
        return result  # ty: ignore[invalid-explicit-return]


def _loss_term(given: Mapping[str, Any], context: BuildContext) -> LossTerm:
    config = config_class("loss", given["use"]).model_validate(given)
    return LossTerm(config.build(context), config.coefficient, config.unit)  # ty: ignore[missing-attribute]


def _aggregation(options: RankOptions) -> Aggregation | None:
    given = options.aggregation
    return config_class("aggregation", given["use"]).model_validate(given).build(options.context) if given else None


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
