"""``reward: math``: 1.0 if the final answer of a response equals the label, by math-verify; else 0.0.

math-verify keeps time by SIGALRM, which only a main thread may use, and without that keeps none. So it runs in worker processes; one
that takes too long is killed and replaced, and the call is an error that names the sample: never a silent 0.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import subprocess
import sys
import threading
from concurrent.futures import Future
from importlib.util import find_spec
from multiprocessing import Pipe
from queue import SimpleQueue
from typing import ClassVar

from pydantic import Field

from ..errors import DataError, PluginError, RunError
from ..plugin_finding import EXTRAS
from ..plugins import RewardConfig
from ..protocols import BuildContext
from ..sample import Sample

MARKS = ("####", "\\boxed{")
"""What stands before a final answer."""

START_S = 120.0
"""A worker imports sympy; on a busy machine that takes its time."""


class Math(RewardConfig):
    """Options of ``reward: math``. ``timeout_s`` is what a worker may take for one sample."""

    point: ClassVar[str] = "reward"
    target: ClassVar[str] = "miles_core.rewards.math:MathReward"
    keeps_time: ClassVar[bool] = True

    marked: bool = True
    """Only a marked answer counts: the line after the last ``####``, or ``\\boxed{…}``. False takes the last formula or number of any
    text, which policies learn to exploit (docs/gsm8k.md)."""
    workers: int = Field(2, gt=0)
    """Worker processes; they start with the first sample and are shared by all rewards of this process with as many."""


class MathReward:
    """Compares ``metadata["response"]`` with the label. Raises PluginError when math-verify is not installed."""

    def __init__(self, config: Math, context: BuildContext):
        if find_spec("math_verify") is None:
            raise PluginError(f"reward math needs math-verify; pip install '{EXTRAS['math_verify']}'")
        self.config = config
        self._pool = shared_pool(config.workers)

    async def __call__(self, sample: Sample) -> float:
        """1.0 or 0.0.

        Raises:
            DataError: The sample has no response, or its label is missing or nothing that can be compared.
            RunError: The worker died, or took longer than ``timeout_s``.
        """
        response = sample.metadata.get("response")
        if not isinstance(response, str):
            raise DataError(f"sample {sample.id}: metadata['response'] is {response!r}; reward math needs the response's text there")
        if isinstance(sample.label, bool) or not isinstance(sample.label, str | int | float):
            raise DataError(f"sample {sample.id}: label is {sample.label!r}; reward math compares with a number or a text")
        if self.config.marked and not any(mark in response for mark in MARKS):
            return 0.0
        try:
            verdict = await self._pool.compare(response, str(sample.label), self.config.timeout_s)
        except RunError as error:
            raise RunError(f"sample {sample.id}: {error}") from error
        if verdict is None:
            raise DataError(f"sample {sample.id}: math-verify can make nothing of the label {sample.label!r}; write a number or a formula")
        return verdict

    def close(self) -> None:
        """Stop the workers; they start again when they are needed."""
        self._pool.close()


class WorkerDied(RunError):
    """The process ended by itself; the work is given to a new one."""


class Worker:
    """One worker process, started when it is needed and again when it was killed or died. Used by one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._closed = False

    def compare(self, response: str, label: str, seconds: float) -> float | None:
        """See ``math_worker.compare``. Raises RunError past the deadline, or when two processes died over it."""
        try:
            return self._compare(response, label, seconds)
        except WorkerDied:
            return self._compare(response, label, seconds)

    def close(self) -> None:
        """Kill the process and start no other; may be called from any thread."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def end(self) -> int:
        """Kill the process, wait until it is gone and return its exit code (negative: a signal)."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        self._pipe.close()
        return process.wait()

    def _compare(self, response: str, label: str, seconds: float) -> float | None:
        if self._process is None:
            self._start()
        question = json.dumps([response, label, seconds]).encode()
        return json.loads(self._receive(seconds, f"compare {response[-80:]!r} with {label!r}", question))

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "miles_core.rewards.math_worker", str(theirs.fileno())]
        # A session of its own: Ctrl-C is for the run, which then ends its workers.
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        self._receive(START_S, "start")

    def _receive(self, seconds: float, what: str, question: bytes | None = None) -> bytes:
        """The next message from the process, after sending a question."""
        if self._closed:
            self.end()
            raise RunError("reward math was closed")
        try:
            if question is not None:
                self._pipe.send_bytes(question)
            if self._pipe.poll(seconds):
                return self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise WorkerDied(f"a worker process of reward math ended with code {self.end()} when it was to {what}") from None
        self.end()
        raise RunError(f"reward math waited {seconds:g} s for a worker process to {what}; raise timeout_s if that is too short")


class Pool:
    """Workers, each driven by a thread of its own; none before the first call."""

    def __init__(self, size: int):
        self.size = size
        self._jobs: SimpleQueue = SimpleQueue()
        self._threads: dict[threading.Thread, Worker] = {}
        self._lock = threading.Lock()
        atexit.register(self.close)

    async def compare(self, response: str, label: str, seconds: float) -> float | None:
        """``math_worker.compare`` in the next free worker, which may take so many seconds for it. Raises RunError past that."""
        with self._lock:
            if not self._threads:
                for worker in (Worker() for _ in range(self.size)):
                    thread = threading.Thread(target=_drive, args=(worker, self._jobs), daemon=True, name="miles-math")
                    self._threads[thread] = worker
                    thread.start()
        future: Future = Future()
        self._jobs.put((future, response, label, seconds))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End all workers and their threads; calls in progress fail. The next call starts new ones."""
        with self._lock:
            threads, self._threads = self._threads, {}
            jobs, self._jobs = self._jobs, SimpleQueue()
        for worker in threads.values():
            worker.close()
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            thread.join()


def _drive(worker: Worker, jobs: SimpleQueue) -> None:
    """Give jobs to a worker until one is None."""
    while job := jobs.get():
        future, *question = job
        if not future.set_running_or_notify_cancel():
            continue  # nobody waits any more
        try:
            future.set_result(worker.compare(*question))
        except Exception as error:  # belongs to whoever asked
            future.set_exception(error)
    worker.end()


@functools.cache
def shared_pool(size: int) -> Pool:
    """The pool of this process with so many workers."""
    return Pool(size)
