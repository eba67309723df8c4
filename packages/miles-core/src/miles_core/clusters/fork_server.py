"""The process that imports a worker's module once and forks ranks from it, as this side sees it; the other side is ``rank.main``."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import MilesError, PluginError, RunError
from . import wire
from .exchange import RankTraceback
from .rank import Failure

_numbers = itertools.count()


class ForkServer:
    """The process that imports a worker's module and forks ranks."""

    def __init__(self, module: str, log: Path) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the cores from other ranks
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to ask whether there is CUDA must not start it: a fork could not use it then
        }
        code = f"from miles_core.clusters.rank import main; main({theirs.fileno()})"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        self._control, self._log, self._module = ours, log, module
        self._lock = threading.Lock()
        self._loaded = False

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def load(self, worker_module: str, end: float, seconds: float) -> None:
        """Import the module, once."""
        with self._lock:
            if self._loaded:
                return
            self._ask(("load", worker_module, list(sys.path)), [], end, f"module {worker_module!r} to be imported", seconds)
            self._loaded = True

    def fork(self, logs: list[str], ends: list[socket.socket], threads: int, end: float, seconds: float) -> int:
        """Fork a rank for each log, each to compute with so many threads; returns the group's number."""
        number = next(_numbers)
        with self._lock:
            request = ("fork", number, logs, threads, list(sys.path), str(Path.cwd()))
            self._ask(request, [e.fileno() for e in ends], end, f"{len(ends)} ranks to be forked", seconds)
        for one in ends:
            one.close()
        return number

    def dump(self, group: int, ranks: list[int]) -> None:
        """Let ranks write their stacks to their logs, if that is possible."""
        with self._lock, contextlib.suppress(MilesError):
            self._ask(("dump", group, ranks), [], time.monotonic() + 10, "stacks", 10)

    def end(self, group: int, dying: list[int]) -> list[int]:
        """End a group; its exit statuses, none if the server is gone (its ranks are gone with it)."""
        with self._lock:
            try:
                return self._ask(("end", group, dying), [], time.monotonic() + 30, "ranks to end", 30)
            except RunError:
                self._kill()
                return []

    def close(self) -> None:
        """End it and whatever it forked. In the middle of an import it does not listen: it has forked nothing yet."""
        if not self._loaded:
            self._process.kill()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # wakes who waits for an answer
        self._control.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, request: tuple, descriptors: list[int], end: float, what: str, seconds: float) -> Any:
        try:
            self._control.settimeout(None)
            socket.send_fds(self._control, [b"+"], descriptors)
            wire.send(self._control, wire.encode(request), end)
            reply = wire.receive(self._control, end)
        except (OSError, EOFError):
            raise RunError(f"the process that forks the ranks of {self._module} is gone; its log is {self._log}") from None
        except wire.Silence:
            self._kill()  # with a request half done it cannot be asked again
            raise RunError(f"the run waited {seconds:g} s for {what}; the log is {self._log}") from None
        if isinstance(reply, Failure):
            raise PluginError(f"{self._module} cannot be made ranks of: {reply.sentence}") from RankTraceback(reply.traceback)
        return reply
