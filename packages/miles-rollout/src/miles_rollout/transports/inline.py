"""``weight_transport: inline``: weights to engines of the same process, tensor by tensor, compared afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from miles_core.digests import digests
from miles_core.errors import RunError
from miles_core.protocols import BuildContext, SharesMemory, WeightSource

from ..plugins import InlineTransportConfig
from .verification import syncing

if TYPE_CHECKING:
    from torch import Tensor

Named = Sequence[tuple[str, "Tensor"]]


class InlineTransport:
    """A WeightTransport that hands the trainer's tensors to each engine and compares digests of what both then hold.

    Where nothing is sampled while weights change (``max_staleness: 0``) a single engine and its trainer share memory after the first
    publish: nothing is copied any more, and only what does not lie in one place is compared.
    """

    def __init__(self, config: InlineTransportConfig, context: BuildContext) -> None:
        self._alternate = context.stage is not None and context.stage.max_staleness == 0

    async def publish(self, source: WeightSource, sinks: list[Any], version: int) -> dict[str, float]:
        """Give every sink the source's weights as ``version`` and verify them.

        Returns:
            ``bytes`` copied, all sinks together, and ``seconds``.

        Raises:
            RunError: A sink holds something else afterwards; names the sink and the first tensor that differs.
        """
        began = time.perf_counter()
        weights = await asyncio.to_thread(lambda: list(source.named_weights()))
        copied, sent = 0, dict[str, str]()
        async with syncing(sinks):
            for index, sink in enumerate(sinks):
                places = {name: _place(tensor) for name, tensor in sink.named_weights()}
                apart = [(name, tensor) for name, tensor in weights if places.get(name) != _place(tensor)]
                await sink.update_weights(weights, version)
                sent |= await asyncio.to_thread(lambda new: dict(digests(new)), [one for one in apart if one[0] not in sent])
                held = await asyncio.to_thread(digests, _rest(sink, weights, apart))
                _compare([(name, sent[name]) for name, _ in apart], held, index, sink, version)
                copied += sum(tensor.numel() * tensor.element_size() for _, tensor in apart)
        if self._alternate and len(sinks) == 1 and copied and isinstance(source, SharesMemory):
            await asyncio.to_thread(source.share_memory, dict(sinks[0].named_weights()))
        return {"bytes": float(copied), "seconds": time.perf_counter() - began}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how it is read; equal ones are one."""
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _rest(sink: Any, weights: Named, apart: Named) -> Named:
    """What a sink holds, but for the weights that lie in one place with those that were sent."""
    together = {name for name, _ in weights} - {name for name, _ in apart}
    return [(name, tensor) for name, tensor in sink.named_weights() if name not in together]


def _compare(sent: list[tuple[str, str]], held: list[tuple[str, str]], index: int, sink: Any, version: int) -> None:
    """Raise a RunError unless both are the digests of the same weights; trainer and engine each have an order of their own."""
    for sent_one, held_one in zip_longest(sorted(sent), sorted(held), fillvalue=("nothing", "")):
        if sent_one != held_one:
            raise RunError(
                f"engine {index} ({type(sink).__name__}) does not hold version {version} of the weights: where {sent_one[0]!r} was "
                f"sent it has {'another ' * (sent_one[0] == held_one[0])}{held_one[0]!r}. Its weights must not be used."
            )
