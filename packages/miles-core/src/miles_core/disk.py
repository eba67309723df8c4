"""Files that are whole and on the disk itself; a disk that takes no more, as a sentence: which, how much is free, what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import MilesError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT)
BROKEN = (errno.EIO, errno.EROFS)


def os_error(error: BaseException | None) -> OSError | None:
    """The OSError that an error is or comes from, also where safetensors hides it in a text; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
            return error
        if isinstance(error, SafetensorError) and (code := re.search(r"os error (\d+)", str(error))):
            return OSError(int(code[1]), os.strerror(int(code[1])))
        error = error.__cause__
    return None


def trouble(path: Path, error: OSError) -> str:
    """What is wrong where a directory lies, how much is free there, and what to do about it."""
    if error.errno in FULL:
        state, advice = "is full", "Make room, or lower keep_checkpoints"
    elif error.errno in BROKEN:
        state, advice = "fails", "Look at the system's log for it"
    else:
        state, advice = "takes nothing", "See to that"
    where = f", writing {error.filename}" if error.filename else ""
    free = shutil.disk_usage(path).free
    return f"the disk of {path} {state} ({error.strerror or error}{where}); {free:,} bytes are free there. {advice}."


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, under its name only once it is on the disk itself."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_one(path.parent)


def sync(directory: Path) -> None:
    """Have everything in a directory on the disk itself, not only with the operating system."""
    for path in sorted(directory.rglob("*"), reverse=True):
        sync_one(path)
    sync_one(directory)


def sync_one(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def sentences(path: Path) -> Generator[None]:
    """Make a RunError of whatever says that the disk of a run in ``path`` is full or broken; notes on the error are kept."""
    try:
        yield
    except MilesError:
        raise
    except Exception as error:
        cause = os_error(error)
        if cause is None or cause.errno not in FULL + BROKEN:
            raise
        sentence = RunError(trouble(path, cause))
        go_on = [f"Go on with: miles resume {path}"] if (path / "config.yaml").is_file() else []
        for note in getattr(error, "__notes__", go_on):
            sentence.add_note(note)
        raise sentence from error
