"""cluster: starts the processes that a model is spread over. Here none: a model on one rank is in this very process, for a debugger.

In a recipe:

    cluster: "this_process:ThisProcess"
"""

import asyncio

from miles_core.plugin_finding import import_object
from miles_core.protocols.cluster import Place


class OneRank:
    """What a trainer holds of its ranks: a method of the worker is called on all of them at a time."""

    size = 1

    def __init__(self, worker):
        self.worker = worker

    async def call(self, method, arguments, *, seconds, what):
        async with asyncio.timeout(seconds):
            return [await asyncio.to_thread(getattr(self.worker, method), *arguments[0])]

    def stream(self, method, arguments, *, seconds, what):
        return getattr(self.worker, method)(*arguments[0])

    async def close(self):
        del self.worker


class ThisProcess:
    async def start(self, worker, size, arguments, *, name, log_dir, seconds):
        if size != 1:
            raise ValueError(f"{name} wants {size} ranks; this process is one")
        place = Place(rank=0, size=1, local_rank=0, rendezvous=f"file://{log_dir.resolve()}/{name}.meet", threads=1)
        return OneRank(await asyncio.to_thread(import_object(worker), place, *arguments[0]))

    async def close(self):
        """Nothing to end."""
