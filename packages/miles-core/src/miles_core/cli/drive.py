"""Running under a live view, with Ctrl-C as a request to stop; for the commands and for ``miles.run``."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

from ..config import RunConfig
from ..run_dir import RunDir
from ..runner import Outcome, Run
from .live import JsonView, LiveView
from .screen import console, errors


def drive(config: RunConfig, directory: RunDir | None, as_json: bool = False) -> Outcome:
    """A new run, or the one in ``directory`` from its newest cut. Raises MilesError."""
    with JsonView() if as_json else LiveView(config, console) as view:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(_until_done(Run(config, view), directory))
        with ThreadPoolExecutor(1) as thread:  # in a notebook, whose own loop is running: without Ctrl-C's orderly end
            return thread.submit(lambda: asyncio.run(_until_done(Run(config, view), directory))).result()


async def _until_done(runner: Run, directory: RunDir | None) -> Outcome:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(runner.start() if directory is None else runner.resume(directory))
    if threading.current_thread() is not threading.main_thread():
        return await task  # signals are the main thread's

    def interrupted() -> None:
        runner.request_stop()
        errors.print("\n[yellow]Stopping after this step[/] (Ctrl-C again: at once, what is since the last cut is lost)")
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        loop.add_signal_handler(signal.SIGINT, task.cancel)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    return await task
