"""Memory that runs out, as a sentence: whose, and which settings need less."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

from .errors import MilesError, RunError

LESS = (
    "Training needs less with a lower trainer.micro_batch_tokens or recompute: true, sampling with a lower engine.max_batch or "
    "rollout.sampling.max_tokens, both with a smaller model or fewer groups a step"
)


def ran_out(error: BaseException | None) -> BaseException | None:
    """The error that says so, of those that an error comes from; None if memory is not what it is about. Imports no torch."""
    while error is not None:
        of_torch = isinstance(error, RuntimeError) and re.search(r"(?i)can't allocate memory|out of memory", str(error))
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or of_torch:
            return error
        error = error.__cause__
    return None


@contextmanager
def sentences() -> Generator[None]:
    """Make a RunError of whatever says that memory ran out; notes on the error are kept. One of ours that comes from it says so already,
    and gets a note of what needs less."""
    try:
        yield
    except Exception as error:
        if (cause := ran_out(error)) is None:
            raise
        if isinstance(error, MilesError):
            error.add_note(f"{LESS}.")
            raise
        where = "of the GPU" if re.search(r"\b(CUDA|HIP)\b", str(cause)) else "of this machine"
        reason = " ".join(str(cause).split())[:200]
        sentence = RunError(f"the memory {where} ran out{f' ({reason})' if reason else ''}. {LESS}.")
        for note in getattr(error, "__notes__", []):
            sentence.add_note(note)
        raise sentence from error
