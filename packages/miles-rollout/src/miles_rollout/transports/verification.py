"""How a transport knows that engines hold the same weights, and keeps them from serving until it does."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from miles_core.errors import RunError


@asynccontextmanager
async def syncing(sinks: list[Any]) -> AsyncGenerator[None]:
    """No sink serves while the block runs, and if it fails none whose weights changed in it; see ``WeightSink.syncing``."""
    async with AsyncExitStack() as stack:
        for sink in sinks:
            await stack.enter_async_context(sink.syncing())
        yield


async def expect_equal(sinks: list[Any], version: int) -> list[str]:
    """Each sink's checksum; those of sinks of one kind must be equal (other kinds hold their weights in another form).

    Raises:
        RunError: Two of one kind differ; names them.
    """
    checksums: list[str] = []
    first: dict[str, int] = {}
    for index, sink in enumerate(sinks):
        checksums.append(await sink.checksum())
        kind = type(sink).__name__
        other = first.setdefault(kind, index)
        if checksums[index] != checksums[other]:
            raise RunError(
                f"engine {index} ({kind}) does not hold the same weights as engine {other} after version {version} was published (checksum "
                f"{checksums[index]}, not {checksums[other]}). Its weights must not be used."
            )
    return checksums
