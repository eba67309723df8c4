"""Weights by value to several servers: one thread takes them from the trainer and packs them while others are on their way.

They go in requests, as SGLang takes them from anywhere, or beside requests through process groups, which costs a fraction of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from miles_core.errors import MilesError
from miles_core.waiting import in_daemon_thread

from .client import SglangClient
from .group import Group
from .payload import Bucket, buckets


class Receiver(Protocol):
    """A server that takes weights: its client, how many ranks it has, and the group with them if they are in one."""

    client: SglangClient
    ranks: int
    group: Group | None


OnAll = Callable[[Callable[[Receiver], Awaitable[None]]], Awaitable[None]]
"""Makes a call of all servers at once."""


@dataclass(frozen=True)
class Way:
    """How weights get to servers."""

    bucket_bytes: int
    """Of weights in a bucket."""
    in_flight: int
    """Buckets on their way at a time."""
    pack: Callable[[Bucket], Callable[[Receiver], Awaitable[None]]]
    """Makes ready, in a thread, what then sends the bucket to a server."""


def _in_request(bucket: Bucket) -> Callable[[Receiver], Awaitable[None]]:
    request = bucket.request()
    return lambda server: server.client.update_bucket(request, server.ranks)


def _through_group(bucket: Bucket) -> Callable[[Receiver], Awaitable[None]]:
    async def send(server: Receiver) -> None:
        assert server.group is not None, "joined before the update began"
        await server.group.send(bucket)

    return send


# Measured. Larger requests do not stay in the processors' caches, smaller ones cost requests; a server reads one while it decodes another
# and loads a third. A group takes one bucket at a time, so that each costs a request's way there and back.
IN_REQUESTS = Way(bucket_bytes=4 << 20, in_flight=3, pack=_in_request)
THROUGH_GROUPS = Way(bucket_bytes=16 << 20, in_flight=1, pack=_through_group)


async def send_weights(weights: Iterable[tuple[str, Tensor]], on_all: OnAll, begin: Callable[[], None], way: Way) -> None:
    """Send all weights to all servers, each bucket to all of them at once.

    Args:
        weights: Gone through once, in a thread; it may block.
        on_all: Reaches the servers.
        begin: Called right before the first change.
        way: How.

    Raises what ``weights`` and ``on_all`` raise.
    """
    packed = (way.pack(bucket) for bucket in buckets(weights, way.bucket_bytes))
    send = await in_daemon_thread(next, packed, None)
    if send is None:
        return
    begin()
    sent: set[asyncio.Future[None]] = set()
    try:
        await on_all(lambda server: server.client.begin_update())
        while send is not None:
            sent.add(asyncio.ensure_future(on_all(send)))
            send = await in_daemon_thread(next, packed, None)
            sent = await _at_most(sent, way.in_flight - 1)
        await _at_most(sent, 0)
    except BaseException:
        await _abandon(sent, on_all)
        raise
    await on_all(lambda server: server.client.end_update())


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
