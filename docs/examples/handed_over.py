"""weight_transport: carries weights from the trainer to engines, and proves that they arrived. Here within one process.

In a recipe:

    models: {policy: {transport: "handed_over:HandedOver"}}
"""

import asyncio
import time

from miles_core.errors import RunError


class HandedOver:
    async def publish(self, source, sinks, version):
        """Give every sink the weights as ``version``; metrics come back as ``publish/<name>``."""
        began = time.perf_counter()
        weights = await asyncio.to_thread(lambda: dict(source.named_weights()))  # a trainer far away may take its time
        for sink in sinks:
            async with sink.syncing():  # nothing is sampled meanwhile, and nothing served if this block fails
                await sink.update_weights(weights.items(), version)
                for name, held in sink.named_weights():
                    if not held.equal(weights[name]):
                        raise RunError(f"{name!r} did not arrive as version {version}; the engine must not be used")
        return {"seconds": time.perf_counter() - began, "tensors": float(len(weights))}
