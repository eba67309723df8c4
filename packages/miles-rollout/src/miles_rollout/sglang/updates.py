"""Weights by value to several servers: one thread takes them from the trainer and packs them while others are on their way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from torch import Tensor

from miles_core.errors import MilesError
from miles_core.waiting import in_daemon_thread

from .client import SglangClient
from .payload import Request, buckets

IN_FLIGHT = 3
"""Buckets on their way at a time: a server reads one while it decodes another and loads a third."""


class Receiver(Protocol):
    """A server that takes weights: its client, and how many ranks it has."""

    client: SglangClient
    ranks: int


OnAll = Callable[[Callable[[Receiver], Awaitable[None]]], Awaitable[None]]
"""Makes a call of all servers at once."""


async def send_weights(weights: Iterable[tuple[str, Tensor]], on_all: OnAll, begin: Callable[[], None]) -> None:
    """Send all weights to all servers, each bucket to all of them at once.

    Args:
        weights: Gone through once, in a thread; it may block.
        on_all: Reaches the servers.
        begin: Called right before the first change.

    Raises what ``weights`` and ``on_all`` raise.
    """
    packed = (bucket.request() for bucket in buckets(weights))
    request = await in_daemon_thread(next, packed, None)
    if request is None:
        return
    begin()
    sent: set[asyncio.Future[None]] = set()
    try:
        await on_all(lambda server: server.client.begin_update())
        while request is not None:
            sent.add(asyncio.ensure_future(on_all(_sending(request))))
            request = await in_daemon_thread(next, packed, None)
            sent = await _at_most(sent, IN_FLIGHT - 1)
        await _at_most(sent, 0)
    except BaseException:
        await _abandon(sent, on_all)
        raise
    await on_all(lambda server: server.client.end_update())


def _sending(request: Request) -> Callable[[Receiver], Awaitable[None]]:
    return lambda server: server.client.update_bucket(request, server.ranks)


async def _at_most(sent: set[asyncio.Future[None]], limit: int) -> set[asyncio.Future[None]]:
    """Wait until no more than so many are on their way. Raises the failure of one that failed."""
    while len(sent) > limit:
        done, sent = await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    return sent


async def _abandon(sent: set[asyncio.Future[None]], on_all: OnAll) -> None:
    """After a failure: nothing is sent any more, and no update stays open on a server that still answers."""
    for task in sent:
        task.cancel()
    await asyncio.gather(*sent, return_exceptions=True)
    try:
        await on_all(lambda server: server.client.end_update())
    except MilesError:
        return  # what failed before it says more
