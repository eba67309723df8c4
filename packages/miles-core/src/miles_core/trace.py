"""What a run did when: ``logs/trace.json``, for https://ui.perfetto.dev or chrome://tracing. Nothing else is written about time.

The format is Chrome's "JSON array" of trace events; it may end anywhere, so that a run that was killed can be read too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


class Trace:
    """Appends events to a file; times are microseconds of this machine's clock since 1970, so that lives of a run line up.

    Args:
        path: The file; None writes nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path
        if path is None:
            return
        if not path.exists():
            path.write_text("[\n")
        elif not (text := path.read_bytes()).endswith(b"\n"):  # a life that was killed in the middle of a line
            path.write_bytes(text[: text.rindex(b"\n") + 1])

    @contextmanager
    def span(self, name: str, **facts: str | int | float) -> Generator[None]:
        """One phase of the loop: they follow and hold each other, on one track."""
        began = time.time()
        try:
            yield
        finally:
            self._write({"ph": "X", "name": name, "ts": began * 1e6, "dur": (time.time() - began) * 1e6, "tid": 0, "args": facts})

    @contextmanager
    def task(self, kind: str, id: str, **facts: str | int | float) -> Generator[None]:
        """One of many that go on at the same time (a group in rollout)."""
        event = {"name": kind, "cat": kind, "id": id, "tid": 1}
        self._write(event | {"ph": "b", "ts": time.time() * 1e6, "args": {"id": id, **facts}})
        try:
            yield
        finally:
            self._write(event | {"ph": "e", "ts": time.time() * 1e6})

    def _write(self, event: dict) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"pid": os.getpid(), **event}) + ",\n")
