"""``weight_transport: tensor``: weights by value over the engines' own interface, compared now and then with an export on disk."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_core.errors import RunError
from miles_core.protocols import BuildContext, WeightSource

from ..plugins import TensorTransportConfig
from .verification import expect_equal, syncing

if TYPE_CHECKING:
    from torch import Tensor


class TensorTransport:
    """A WeightTransport by value.

    The sinks must agree after every publish. At the first two (the weights they started with, and the first that are others) and every
    ``verify_every`` they load an export of the same weights from a disk besides: that must not change their checksum.
    """

    def __init__(self, config: TensorTransportConfig, context: BuildContext) -> None:
        self._every, self._run_dir = config.verify_every, context.run_dir
        self._published = 0

    async def publish(self, source: WeightSource, sinks: list[Any], version: int) -> dict[str, float]:
        """Give every sink the source's weights as ``version`` and verify them.

        Returns:
            ``bytes`` handed over, all sinks together, ``seconds`` of that, ``verified`` (1: an export on disk had the same checksum) and
            ``verify_seconds``.

        Raises:
            RunError: Sinks of one kind hold different weights, or the same weights from a disk have another checksum.
        """
        began = time.perf_counter()
        size = 0.0
        due = self._every > 0 and (self._published <= 1 or self._published % self._every == 0)
        async with syncing(sinks):
            for sink in sinks:
                counted = _Counted(source.named_weights())
                await self._hand(sink, counted, version)
                size += counted.bytes
            checksums = await expect_equal(sinks, version)
            sent = time.perf_counter()
            if due:
                await self._verify(source, sinks, version, checksums)
        self._published += 1
        return {"bytes": size, "seconds": sent - began, "verified": float(due), "verify_seconds": time.perf_counter() - sent}

    async def _hand(self, sink: Any, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        await sink.update_weights(weights, version)

    async def _verify(self, source: WeightSource, sinks: list[Any], version: int, checksums: list[str]) -> None:
        directory = Path(tempfile.mkdtemp(prefix=f"verify-{version}-", dir=self._run_dir))
        try:
            await source.export(directory)
            for index, sink in enumerate(sinks):
                await sink.load_weights(directory, version)
                if (loaded := await sink.checksum()) != checksums[index]:
                    raise RunError(
                        f"engine {index} ({type(sink).__name__}) held other weights after version {version} was sent to it by value "
                        f"(checksum {checksums[index]}) than after it loaded an export of them from a disk ({loaded}). Neither can be "
                        "trusted: see whether the trainer's export and its named weights agree."
                    )
        finally:
            shutil.rmtree(directory, ignore_errors=True)


class _Counted:
    """Weights that pass, and how many bytes they were."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights, self.bytes = weights, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights:
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor
