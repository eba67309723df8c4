"""Messages between processes of one run, over socket pairs that nobody else can reach.

A message is a pickled value. NumPy arrays go beside it as they are: each side copies them once, into or out of the socket.
"""

from __future__ import annotations

import pickle
import socket
import struct
import time
from typing import Any

import numpy as np

_COUNT = struct.Struct("<Q")


class Silence(Exception):
    """Nothing came in time."""


def encode(value: Any) -> list[memoryview]:
    """A message as the parts that are sent one after another. Raises what pickle raises for values that cannot be sent."""
    buffers: list[pickle.PickleBuffer] = []
    parts = [memoryview(pickle.dumps(value, protocol=5, buffer_callback=buffers.append)), *(b.raw() for b in buffers)]
    sizes = struct.pack(f"<{len(parts)}Q", *(p.nbytes for p in parts))
    return [memoryview(_COUNT.pack(len(parts)) + sizes), *parts]


def send(connection: socket.socket, parts: list[memoryview], end: float | None = None) -> None:
    """Send an encoded message. Raises OSError if the other side is gone, Silence if it does not read before ``end`` (monotonic)."""
    for part in parts:
        done = 0
        while done < part.nbytes:
            _limit(connection, end)
            try:
                done += connection.send(part[done : done + 2**20])
            except TimeoutError:
                raise Silence from None


def receive(connection: socket.socket, end: float | None = None) -> Any:
    """The next message. Raises EOFError if the other side is gone, Silence if it is not complete before ``end`` (monotonic)."""
    (count,) = _COUNT.unpack(_read(connection, _COUNT.size, end))
    sizes = struct.unpack(f"<{count}Q", _read(connection, 8 * count, end))
    pickled, *buffers = (_read(connection, size, end) for size in sizes)
    return pickle.loads(pickled, buffers=buffers)


def _read(connection: socket.socket, size: int, end: float | None) -> memoryview:
    data = np.empty(size, np.uint8).data  # a bytearray would be filled with zeros first
    done = 0
    while done < size:
        try:
            _limit(connection, end)
            got = connection.recv_into(data[done:])
        except TimeoutError:
            raise Silence from None
        except OSError as error:
            raise EOFError(str(error)) from error
        if not got:
            raise EOFError
        done += got
    return data


def _limit(connection: socket.socket, end: float | None) -> None:
    """What the next operation may take; a wait that is over still takes what is there already."""
    connection.settimeout(None if end is None else max(end - time.monotonic(), 1e-3))
