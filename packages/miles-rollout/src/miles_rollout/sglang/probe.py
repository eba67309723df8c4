"""What an interpreter has to serve with: asked in one short process, without importing SGLang."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from miles_core.errors import ConfigError

SGLANG = "0.5.23"
"""The version whose HTTP interface and options Miles speaks."""
SECONDS = 60.0
"""Deadline of a probe: a cold disk, not a slow program, is what takes time."""

QUESTION = """
import json, platform
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({"python": platform.python_version(), **{n: version(n) for n in ("sglang", "torch", "transformers")}}))
"""


@dataclass(frozen=True)
class Versions:
    """Of what a server's process runs on."""

    python: str
    sglang: str
    torch: str
    transformers: str


def probe(interpreter: Path) -> Versions:
    """Versions of Python, sglang, torch and transformers under an interpreter.

    Raises:
        ConfigError: There is no such interpreter, it does not answer, or it lacks one of them or has another SGLang than Miles speaks to.
    """
    advice = "`miles engine install sglang-cpu` builds one for CPUs; set the engine's `interpreter` to a Python that has sglang otherwise."
    if not (interpreter.is_file() and os.access(interpreter, os.X_OK)):
        raise ConfigError(f"SGLang's interpreter {interpreter} is not an executable file. {advice}")
    try:
        answer = subprocess.run([str(interpreter), "-I", "-c", QUESTION], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"SGLang's interpreter {interpreter} did not say its versions within {SECONDS:g} s. {advice}") from error
    except OSError as error:
        raise ConfigError(f"SGLang's interpreter {interpreter} cannot be run: {error.strerror}. {advice}") from error
    try:
        versions = json.loads(answer.stdout)
        versions = {name: versions[name] for name in Versions.__dataclass_fields__}
    except (ValueError, TypeError, KeyError):
        words = " ".join((answer.stderr or answer.stdout).decode(errors="replace").split())[-300:] or "nothing"
        raise ConfigError(f"SGLang's interpreter {interpreter} did not say its versions; it said: {words}. {advice}") from None
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        raise ConfigError(f"SGLang's interpreter {interpreter} has no {' and no '.join(missing)}. {advice}")
    if versions["sglang"] != SGLANG:
        raise ConfigError(f"{interpreter} has sglang {versions['sglang']}; Miles speaks to {SGLANG}. {advice}")
    return Versions(**versions)
