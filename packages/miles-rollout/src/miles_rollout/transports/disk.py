"""``weight_transport: disk``: weights through a directory that trainer and engines share."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from miles_core.protocols import BuildContext, WeightSource

from ..plugins import DiskTransportConfig
from .verification import expect_equal, syncing


class DiskTransport:
    """A WeightTransport by export and load. The directory is gone afterwards."""

    def __init__(self, config: DiskTransportConfig, context: BuildContext) -> None:
        self._run_dir = context.run_dir

    async def publish(self, source: WeightSource, sinks: list[Any], version: int) -> dict[str, float]:
        """Export the source's weights, have every sink load them as ``version``, and compare what the sinks then hold.

        Returns:
            ``bytes`` of the weights' files, read by all sinks together, and ``seconds``.

        Raises:
            RunError: Sinks of one kind hold different weights; names them.
        """
        began = time.perf_counter()
        directory = Path(tempfile.mkdtemp(prefix=f"publish-{version}-", dir=self._run_dir))
        try:
            await source.export(directory)
            size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
            async with syncing(sinks):
                for sink in sinks:
                    await sink.load_weights(directory, version)
                await expect_equal(sinks, version)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return {"bytes": float(size * len(sinks)), "seconds": time.perf_counter() - began}
