"""Runs a server so that nothing of it outlives us: ``guard.py PARENT SCRATCH COMMAND …``, standard library only.

The server gets a session of its own and SCRATCH as its temporary directory. All of it is killed, and its files are removed,
when this process gets SIGTERM, when the process PARENT is gone in whatever way, or when the server's first process has
ended. If this process is killed itself, the kernel kills the server's first process, and SGLang's other processes have
asked the kernel for the same. The exit status is the server's, 128 + N for signal N.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
LAST_WORDS = 1.0
"""Seconds for what cleans up behind the server (Python's resource tracker: semaphores, shared memory)."""


def main(parent: int, scratch: Path, command: list[str]) -> int:
    """Run the command to its end, or end it; returns the exit status."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # the server's orphans become our children: we see when they are gone
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)

    def in_child() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    held: set[Path] = set()
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=in_child)
        while server.poll() is None and os.getppid() == parent:
            held = held or shared_memory(server.pid)
            caught = signal.sigtimedwait(WATCHED, 0.5)
            if caught is not None and caught.si_signo != signal.SIGCHLD:
                break
        end(server)
    finally:
        clear(scratch, held)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def end(server: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the server's session. SGLang's own orderly end takes ten seconds and gives us nothing."""
    server.kill()
    server.wait()
    deadline = time.monotonic() + LAST_WORDS
    while _children() and time.monotonic() < deadline:
        time.sleep(0.01)
    if _children():
        with contextlib.suppress(ProcessLookupError):  # what is left may have a group of its own
            os.killpg(server.pid, signal.SIGKILL)
        while _children() and time.monotonic() < deadline + LAST_WORDS:
            time.sleep(0.01)


def shared_memory(session: int) -> set[Path]:
    """What SGLang's processes tell each other of their load in: a file of a random name that outlives them when they are killed."""
    held = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
                if os.getsid(int(process.name)) == session:
                    lines = (process / "maps").read_text().splitlines()
                    held |= {Path(line.split(maxsplit=5)[5]) for line in lines if "/dev/shm/sglang_loads_" in line}
    return held


def clear(scratch: Path, held: set[Path]) -> None:
    """Remove the server's temporary files and what it held in shared memory."""
    for file in held:
        file.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


def _children() -> bool:
    """Whether something of the server is still there; takes note of what has ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
