"""``weight_transport: collective``: weights by value through process groups of this process and the engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from miles_core.protocols import TakesBroadcasts

from .tensor import TensorTransport

if TYPE_CHECKING:
    from torch import Tensor


class CollectiveTransport(TensorTransport):
    """A WeightTransport by value, verified as `tensor` is; its sinks are TakesBroadcasts."""

    async def _hand(self, sink: TakesBroadcasts, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        await sink.broadcast_weights(weights, version)
