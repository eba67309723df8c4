"""One SGLang server: a process (with children of its own) that is started, watched and ended, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from miles_core.errors import RunError

from . import guard
from .launch import HOST, Launch
from .probe import Versions, probe

PORT_ATTEMPTS = 3
STOP_SECONDS = 15.0
ERROR = re.compile(r"(\[.*?\] )?[\w.]*(Error|Exception)\b.*: ")
TOO_EARLY = "Connection refused"
"""In the traceback of SGLang's first call to itself, which it makes before it listens; told to nobody."""


class ServerProcess:
    """A server that this process owns. Ended by ``stop``, and without it when this process ends in whatever way."""

    def __init__(self, launch: Launch):
        """Starts nothing yet. Raises ConfigError when the model is not a directory with a readable config.json."""
        self.launch = launch
        self.token = secrets.token_hex(24)
        """Its API key: every request wants ``Authorization: Bearer <token>``."""
        self.port = 0
        self.versions: Versions | None = None
        self._flags = launch.flags()
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None
        self._started = 0.0
        self._log_start = 0
        self._stopped = False

    @property
    def url(self) -> str:
        """``http://127.0.0.1:<port>``; the port is chosen by ``start``."""
        return f"http://{HOST}:{self.port}"

    @property
    def model_path(self) -> Path:
        """What it was started with."""
        return self.launch.model_path

    @property
    def pid(self) -> int | None:
        """Of the process that guards it; None before the start."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ConfigError: The interpreter is missing, or has no SGLang or another version.
            RunError: It died, or did not answer in time; with the last lines of its log.
        """
        if self._process is not None:
            raise RunError("this SGLang server was started already; a new one needs a ServerProcess of its own")
        self.versions = await asyncio.to_thread(probe, self.launch.interpreter)
        self._started = time.monotonic()
        for attempt in range(PORT_ATTEMPTS):
            self.port = _free_port()
            try:
                self._spawn()
                await self._wait()
                return
            except BaseException as error:  # cancelled too: nothing stays behind
                taken = not self.alive() and "already in use" in self.log_tail(40)
                await self.stop()
                if not (isinstance(error, RunError) and taken and attempt + 1 < PORT_ATTEMPTS):
                    raise

    def alive(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int) -> str:
        """The last lines of its log since the start, without empty ones and without its key."""
        try:
            with open(self.launch.log, "rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 256 * 1024))
                text = log.read().decode(errors="replace").replace(self.token, "***")
        except FileNotFoundError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def describe_death(self) -> str:
        """How it ended, after how long, and the lines of its log that say why."""
        server = f"The SGLang server on port {self.port} ({self.launch.model_path})"
        if self._process is None:
            return f"{server} was not started."
        status = self._process.poll()
        if status is None:
            return f"{server} is running."
        after = f"{time.monotonic() - self._started:.0f} s after its start"
        if self._stopped:
            return f"{server} was stopped {after}."
        return f"{server} ended {after} {_ending(status)}.{self._telling()}"

    async def stop(self) -> None:
        """End it and all its processes at once; does nothing where it is not running.

        Raises:
            RunError: Something of it is still there (a process that even SIGKILL does not end).
        """
        if self._process is not None and self.alive():
            self._stopped = True
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                who = f"the SGLang server on port {self.port} (process {self.pid})"
                raise RunError(f"{who} did not end within {STOP_SECONDS:g} s of being told to") from None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)  # the guard does it, unless it was killed itself

    def _spawn(self) -> None:
        self._scratch = scratch = Path(tempfile.mkdtemp(prefix="miles-sglang-"))
        keys = scratch / "keys.yaml"  # a command line is anyone's to read
        keys.touch(0o600)
        keys.write_text(json.dumps({"api-key": self.token}))
        flags = ["--config", str(keys), "--host", HOST, "--port", str(self.port), *self._flags]
        server = [str(self.launch.interpreter), "-m", "sglang.launch_server", *flags]
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.launch.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # SGLang writes its key into it
        with open(file, "ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(scratch), *server],
                env=self.launch.variables(scratch),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal is ours to handle
            )

    async def _wait(self) -> None:
        """Until it answers with our key, dies, or its time is over."""
        while not await asyncio.to_thread(self._answers):
            if not self.alive():
                raise RunError(self.describe_death())
            if time.monotonic() - self._started > self.launch.boot_seconds:
                raise RunError(
                    f"Waited {self.launch.boot_seconds:g} s for the SGLang server on port {self.port} ({self.launch.model_path}) to answer."
                    f"{self._telling()}"
                )
            await asyncio.sleep(0.1)

    def _answers(self) -> bool:
        """Whether it is ready: another server on the port would not take our key."""
        return self._get("/health") == 200 and self._get("/model_info") == 200

    def _get(self, path: str) -> int | None:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _telling(self) -> str:
        """The errors in its log, its last lines, and where it is."""
        tail = self.log_tail(2000).splitlines()
        if not tail:
            return f" It wrote nothing to its log, {self.launch.log}."
        errors = [line for line in tail[:-8] if ERROR.match(line) and TOO_EARLY not in line]
        shown = "\n".join(f"  {line[:400]}" for line in [*dict.fromkeys(errors[-3:]), *tail[-8:]])
        return f" The end of its log, {self.launch.log}:\n{shown}"


def _free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind((HOST, 0))
        return probe_socket.getsockname()[1]


def _ending(status: int) -> str:
    """An exit status in words; the guard gives the server's, 128 + N for a signal."""
    number = -status if status < 0 else status - 128
    if number > 0 and number in set(signal.Signals):
        hint = " (its own, after an error, or the kernel's, out of memory)" if number == signal.SIGKILL else ""
        return f"by signal {signal.Signals(number).name}{hint}"
    return f"with exit code {status}"
