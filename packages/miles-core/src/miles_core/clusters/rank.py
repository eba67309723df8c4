"""The other side of ``processes``: the server that imports a worker's module once, and the ranks that it forks.

The server answers one request at a time on its socket: import, fork a group, dump stacks, end a group. It ends, and its ranks with it, when
the socket is closed, which is when the process that started it is gone, whatever became of it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import errors
from ..errors import MilesError
from ..plugin_finding import import_object
from ..protocols.cluster import Place
from . import wire

START_OF_LOG = "----- rank"
LEAVE = 2.0
"""Seconds for a rank whose socket was closed to end by itself."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """How a rank failed.

    Attributes:
        kind: Name of a class in ``miles_core.errors``, None for anything but a MilesError.
        sentence: The message; of other exceptions with their class.
        traceback: As Python prints it.
    """

    kind: str | None
    sentence: str
    traceback: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        """What is to be told of an exception."""
        text = "".join(traceback.format_exception(error))
        if isinstance(error, MilesError):
            return Failure(errors.class_name(error), str(error), text)
        return Failure(None, f"{type(error).__name__}: {error}".removesuffix(": "), text)


def main(descriptor: int) -> None:
    """The server's life."""
    control = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run's process decides what Ctrl-C ends
    server = _Server(control)
    try:
        while True:
            message, descriptors = _receive_with_descriptors(control)
            try:
                reply = getattr(server, message[0])(*message[1:], *([descriptors] if descriptors else []))
            except Exception as error:
                reply = Failure.of(error)
            wire.send(control, wire.encode(reply))
    except (EOFError, OSError):
        pass
    finally:
        for group in list(server.groups):
            server.end(group, [])


def _receive_with_descriptors(control: socket.socket) -> tuple[Any, list[int]]:
    """A message, and the descriptors that were announced before it by their number in one byte."""
    data, descriptors, _, _ = socket.recv_fds(control, 1, 255)
    if not data:
        raise EOFError
    return wire.receive(control), list(descriptors)


@dataclass
class _Group:
    pids: list[int]
    directory: str
    statuses: dict[int, int] = field(default_factory=dict)


class _Server:
    """What the server can be asked for."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.groups: dict[int, _Group] = {}

    def load(self, module: str, path: list[str]) -> None:
        """Import the worker's module."""
        sys.path[:] = path
        importlib.import_module(module)
        gc.freeze()  # what is shared with the ranks need not be written to again

    def fork(self, group: int, logs: list[str], threads: int, path: list[str], cwd: str, descriptors: list[int]) -> list[int]:
        """Fork one rank for each log; each gets its end of a socket pair. Returns their pids."""
        directory = tempfile.mkdtemp(prefix="miles-ranks-")
        self.groups[group] = entry = _Group([], directory)
        sys.path[:] = path
        sys.stdout.flush()
        sys.stderr.flush()
        for rank, log in enumerate(logs):
            place = Place(rank, len(logs), rank, f"file://{directory}/store", threads)
            pid = os.fork()
            if pid == 0:
                _be_a_rank(place, log, cwd, descriptors, self.control)
            entry.pids.append(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        return entry.pids

    def dump(self, group: int, ranks: list[int]) -> None:
        """Let ranks write their stacks to their logs."""
        for rank in ranks:
            os.kill(self.groups[group].pids[rank], signal.SIGUSR1)
        time.sleep(0.3)  # a signal has no answer

    def end(self, group: int, dying: list[int]) -> list[int]:
        """End a group and return its exit statuses (negative: signal). ``dying`` ranks are gone already, or about to be."""
        entry = self.groups.pop(group)
        limit = time.monotonic() + LEAVE
        for rank in [*dying, *(r for r in range(len(entry.pids)) if r not in dying)]:
            while rank not in entry.statuses:
                pid, status = os.waitpid(entry.pids[rank], os.WNOHANG)
                if pid:
                    entry.statuses[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > limit:
                    os.kill(entry.pids[rank], signal.SIGKILL)
                    entry.statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(entry.pids[rank], 0)[1])
                else:
                    time.sleep(0.005)
        shutil.rmtree(entry.directory, ignore_errors=True)
        return [entry.statuses[rank] for rank in range(len(entry.pids))]


def _be_a_rank(place: Place, log: str, cwd: str, descriptors: list[int], control: socket.socket) -> None:
    """The life of a forked rank; it never returns."""
    code = 1
    try:
        server = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        control.close()
        for rank, descriptor in enumerate(descriptors):
            if rank != place.rank:
                os.close(descriptor)  # an end that a brother kept open would hide that a rank died
        _print_to(log, place)
        os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.size), "LOCAL_RANK": str(place.local_rank)}
        os.environ["OMP_NUM_THREADS"] = str(place.threads)  # for libraries that are not loaded yet; torch is told by the worker
        os.chdir(cwd)
        if os.getppid() == server:  # else it died before prctl
            _serve(socket.socket(fileno=descriptors[place.rank]), place)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # neither the server's handlers nor its memory are this process's to clean up


def _print_to(log: str, place: Place) -> None:
    nothing, target = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(nothing, 0)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    print(f"{START_OF_LOG} {place.rank} of {place.size}, pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)


def _serve(connection: socket.socket, place: Place) -> None:
    """Answer calls until the socket is closed."""
    worker: Any = None
    while True:
        try:
            mode, method, arguments = wire.receive(connection)
        except EOFError:
            return
        try:
            if mode == "build":
                worker, result = import_object(method)(place, *arguments), None
            elif mode == "call":
                result = getattr(worker, method)(*arguments)
            else:
                result = None
                _stream(connection, getattr(worker, method)(*arguments), silent=mode == "drop")
            reply = wire.encode(("done", result))
        except BrokenPipeError:
            return
        except BaseException as error:
            traceback.print_exc()
            reply = wire.encode(("failed", Failure.of(error)))
        wire.send(connection, reply)


def _stream(connection: socket.socket, items: Iterator[Any], *, silent: bool) -> None:
    """Send items one by one, each when the one before it was taken, until they are not wanted any more; go through all of them."""
    for item in items:
        if not silent:
            wire.send(connection, wire.encode(("item", item)))
            silent = wire.receive(connection) == "drop"
