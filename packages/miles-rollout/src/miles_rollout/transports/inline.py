"""``weight_transport: inline``: weights to engines of the same process, tensor by tensor, compared afterwards."""

from __future__ import annotations

import asyncio
import time
from itertools import zip_longest
from typing import Any

from miles_core.digests import digests
from miles_core.errors import RunError
from miles_core.protocols import BuildContext, WeightSource

from ..plugins import InlineTransportConfig


class InlineTransport:
    """A WeightTransport that hands the trainer's tensors to each engine and compares digests of what both then hold."""

    def __init__(self, config: InlineTransportConfig, context: BuildContext) -> None:
        pass

    async def publish(self, source: WeightSource, sinks: list[Any], version: int) -> dict[str, float]:
        """Give every sink the source's weights as ``version`` and verify them.

        Returns:
            ``bytes`` handed over, all sinks together, and ``seconds``.

        Raises:
            RunError: A sink holds something else afterwards; names the sink and the first tensor that differs.
        """
        began = time.perf_counter()
        weights = await asyncio.to_thread(lambda: list(source.named_weights()))
        sent = await asyncio.to_thread(lambda: sorted(digests(weights)))  # trainer and engine each have an order of their own
        for index, sink in enumerate(sinks):
            await sink.update_weights(weights, version)
            held = await asyncio.to_thread(lambda sink=sink: sorted(digests(sink.named_weights())))
            for sent_one, held_one in zip_longest(sent, held, fillvalue=("nothing", "")):
                if sent_one != held_one:
                    raise RunError(
                        f"engine {index} ({type(sink).__name__}) does not hold version {version} of the weights: where {sent_one[0]!r} was "
                        f"sent it has {'another ' * (sent_one[0] == held_one[0])}{held_one[0]!r}. Its weights must not be used."
                    )
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in weights)
        return {"bytes": float(size * len(sinks)), "seconds": time.perf_counter() - began}
