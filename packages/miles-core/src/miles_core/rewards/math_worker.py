"""A worker process of ``reward: math``: compares answers with math-verify, one after another, until its pipe closes.

A process, not a thread, because nothing else can be stopped: what a policy writes may keep sympy busy for ever (``9!!!!!``).
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

END_OF_TEXT = re.compile(r"(\s*<[^<>\s]*>)+\s*$")
"""``<eos>``, ``<|im_end|>``, ``</s>``: the tokenizer's marks at the end of a response."""


def answer_of(response: str) -> str:
    """The part of a response that is compared: the line after the last ``####``, as ``\\boxed{…}``; else all of it.

    Of a response without ``####`` math-verify takes what is in ``\\boxed{…}``, or else the last formula or number.
    """
    response = END_OF_TEXT.sub("", response)
    _, mark, line = response.rpartition("####")
    return boxed(line.strip().split("\n")[0].rstrip(" .")) if mark else response


def boxed(answer: str) -> str:
    """An answer marked as one, so that all of it is compared and nothing picked from it."""
    return f"\\boxed{{{answer}}}"


@lru_cache(maxsize=4096)
def parsed_label(label: str) -> list[Any]:
    """What a label means; empty when nothing can be made of it."""
    from math_verify import parse

    return parse(boxed(label), parsing_timeout=None)  # ty: ignore[invalid-argument-type]


def compare(response: str, label: str) -> float | None:
    """1.0 if the response's answer equals the label, 0.0 if it differs or cannot be read; None if the label cannot be read."""
    from math_verify import parse, verify

    gold = parsed_label(label)
    if not gold:
        return None
    return float(verify(gold, parse(answer_of(response), parsing_timeout=None), timeout_seconds=None))  # ty: ignore[invalid-argument-type]


def main() -> None:
    """Serve the pipe whose file descriptor is the first argument; each job is ``[response, label, seconds]`` in JSON."""
    import math_verify  # noqa: F401  before saying that we are ready: it takes seconds

    logging.disable()  # math-verify logs every answer that it cannot read
    pipe = Connection(int(sys.argv[1]))
    pipe.send_bytes(b"ready")
    while True:
        try:
            response, label, seconds = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds + 2)  # ends us if nobody is left who would
        pipe.send_bytes(json.dumps(compare(response, label)).encode())
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
