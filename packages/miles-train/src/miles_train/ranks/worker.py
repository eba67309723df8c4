"""What the workers of every trainer over ranks begin with: the ranks meet, plug-ins are imported, losses built from their options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch._dynamo  # torch's optimizers would import it when they are made: here it is done once for all ranks
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from miles_core import errors
from miles_core.columns import register_column
from miles_core.errors import ConfigError, MilesError
from miles_core.plugin_finding import import_module
from miles_core.plugins import config_class
from miles_core.protocols import Aggregation, BuildContext, LossTerm, Place

from .messages import Bucket, RankOptions

T = TypeVar("T")


class RankWorker:
    """A rank. Every public method of a subclass is called on all ranks at the same time.

    Attributes:
        rank: From 0.
        options: What it is built from.
        device: Its own.
        losses: Terms by name; none where the model is not trained.
        aggregation: Of the losses.
    """

    def __init__(self, place: Place, options: RankOptions) -> None:
        cuda = options.context.device == "cuda"
        self.device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
        if cuda:
            _expect_device(place)
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(place.threads)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=place.rendezvous,
            rank=place.rank,
            world_size=place.size,
            timeout=timedelta(seconds=options.timeout_s),
        )
        for module in options.modules:
            import_module(module)
        for spec in options.columns:
            register_column(spec)
        self.rank, self.options = place.rank, options
        self.losses = {name: _loss_term(given, options.context) for name, given in options.losses.items()}
        self.aggregation = _aggregation(options)

    def agreed(self, work: Callable[[], T]) -> T:
        """What ``work``, which waits for no other rank, gives; if it fails on one rank, every rank raises what the first one did."""
        result, failure = None, None
        try:
            result = work()
        except MilesError as error:
            failure = (errors.class_name(error), str(error))
        except (OSError, SafetensorError) as error:
            failure = ("RunError", f"rank {self.rank}: {error}")
        failures: list[tuple[str, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        for first in failures:
            if first is not None:
                raise getattr(errors, first[0])(first[1])
        return result  # ty: ignore[invalid-explicit-return]


def _expect_device(place: Place) -> None:
    if place.local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"rank {place.rank} of {place.size} wants GPU {place.local_rank} of its machine, which has {count}; use as many ranks as GPUs"
        )


def as_message(bucket: Iterable[tuple[str, Tensor]]) -> Bucket:
    """Named tensors as they go to the controller."""
    return [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), _bytes(t)) for name, t in bucket]


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _loss_term(given: Mapping[str, Any], context: BuildContext) -> LossTerm:
    config = config_class("loss", given["use"]).model_validate(given)
    return LossTerm(config.build(context), config.coefficient, config.unit)  # ty: ignore[missing-attribute]


def _aggregation(options: RankOptions) -> Aggregation | None:
    given = options.aggregation
    return config_class("aggregation", given["use"]).model_validate(given).build(options.context) if given else None
