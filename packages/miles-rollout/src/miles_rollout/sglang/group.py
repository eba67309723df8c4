"""A process group of this process and the ranks of one server: weights go through it as they are, beside the requests that name them.

Every server has a group of its own, so that one that dies takes nothing from the others. It is made of torch's gloo on this machine's
loopback; torch registers nothing of it, so that it is gone when nobody holds it any more.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Awaitable
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from miles_core.errors import InfrastructureFailure
from miles_core.waiting import in_daemon_thread

from .client import SglangClient, Silence
from .payload import Bucket

Gloo: Any = ProcessGroupGloo
"""What torch declares of it leaves out how to choose its addresses, and how to broadcast."""

HOST = "127.0.0.1"
"""Where the group meets, and this process's end of every connection in it."""

GRACE = 5.0
"""Seconds beyond its deadline in which a server may still answer a request: what the group itself says of a time-out says more."""


class Group:
    """This process, rank 0, and the ranks of one server. Made, used and left in one event loop.

    After a failure of any call it is of no use any more and must be left: nobody knows what is still on its way.
    """

    def __init__(self, client: SglangClient, ranks: int, seconds: float) -> None:
        """Nothing is opened yet.

        Args:
            client: Of the server.
            ranks: The server's, which follow ours in order.
            seconds: Deadline for all of them to meet, and for each bucket.
        """
        self._client, self._ranks, self._seconds = client, ranks, seconds
        self._name = f"miles-{uuid.uuid4().hex}"  # other trainers may have groups with a server that was not started here
        self._group: Any = None
        self._left = False

    async def join(self) -> None:
        """Meet the server's ranks.

        Raises:
            Silence: They did not come.
            RunError: The server refuses.
            InfrastructureFailure, ConfigError: As for every call of the client.
        """
        listener = socket.create_server((HOST, 0))
        port = listener.getsockname()[1]
        asking = self._client.join_group(self._name, HOST, port, 1 + self._ranks, self._seconds + GRACE)
        await _together(asking, in_daemon_thread(self._meet, listener))

    def _meet(self, listener: socket.socket) -> None:
        deadline, began = timedelta(seconds=self._seconds), time.monotonic()
        port = listener.getsockname()[1]
        what = f"did not meet the trainer at {HOST}:{port} for weight_transport collective (it must run on this machine)"
        # torch's own listener would take connections from anywhere.
        store = TCPStore(HOST, port, is_master=True, timeout=deadline, wait_for_workers=False, master_listen_fd=listener.detach())
        while store.num_keys() < self._ranks:  # each leaves its address there; a wait within torch could not be given up
            if self._left:
                return
            if time.monotonic() - began >= self._seconds:
                raise self._failure(what, began)
            time.sleep(0.01)
        for prefix in (self._name, f"{self._name}/", "cpu/"):  # as SGLang and torch name the keys of a gloo group
            store = PrefixStore(prefix, store)
        options = Gloo._Options()
        options._devices, options._timeout = [Gloo.create_device(hostname=HOST)], deadline
        try:
            self._group = Gloo(store, 0, 1 + self._ranks, options)
        except RuntimeError as error:  # all that torch raises of the store and of gloo
            raise self._failure(what, began) from error

    async def send(self, bucket: Bucket) -> None:
        """Have the server load a bucket: a request that names what is in it, and its bytes through the group at the same time.

        Only one at a time: a rank would take the bytes of one for those of another, or die of their size.

        Raises:
            RunError: The server refuses it.
            Silence: It takes nothing, or does not answer.
            InfrastructureFailure, ConfigError: As for every call of the client, or the group broke.
        """
        asking = self._client.update_from_group(self._name, bucket, self._seconds + GRACE)
        await _together(asking, in_daemon_thread(self._broadcast, bucket.flat[: bucket.used]))

    def _broadcast(self, flat: Tensor) -> None:
        options, began = BroadcastOptions(), time.monotonic()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, timedelta(seconds=self._seconds)
        try:
            self._group.broadcast([flat], options).wait(options.timeout)
        except RuntimeError as error:
            raise self._failure(f"did not take {len(flat)} bytes of weights through its process group", began) from error

    def _failure(self, what: str, began: float) -> InfrastructureFailure:
        if time.monotonic() - began >= self._seconds:
            return Silence(f"{self._client.name} {what} within {self._seconds:g} s. {self._client.log()}")
        return InfrastructureFailure(f"{self._client.name} {what}: the connection broke. {self._client.log()}")

    async def leave(self, seconds: float) -> None:
        """Close our end, so that a rank that waits for weights hears of it, and have the server forget the group.

        Args:
            seconds: How long that may take. A server that does not listen is found out elsewhere; our end closes when it does, or at
                the deadline of what is still on its way to it.
        """
        self._left = True
        steps = {asyncio.ensure_future(in_daemon_thread(self._close)), asyncio.ensure_future(self._client.leave_group(self._name, seconds))}
        await asyncio.wait(steps, timeout=seconds)
        for step in steps:
            step.cancel()
        await asyncio.gather(*steps, return_exceptions=True)

    def _close(self) -> None:
        self._group = None  # waits for what is on its way


async def _together(asking: Awaitable[None], moving: Awaitable[None]) -> None:
    """A request, and what it asks for. Nobody waits for what a failed request asked for; its own deadline ends that."""
    tasks = [asyncio.ensure_future(asking), asyncio.ensure_future(moving)]
    request, movement = tasks
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if movement.done() and movement.exception() is not None and not isinstance(movement.exception(), Silence):
            await asyncio.wait({request})  # it tells what became of the server, which may answer other questions while it dies
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
