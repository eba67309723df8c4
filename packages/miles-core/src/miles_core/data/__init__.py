"""Data sources that come with miles-core (docs/data.md), what they are made of (``rows``, ``chat``, ``order``), and paths of recipes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..plugin_finding import EXTRAS


def local_path(text: str, setting: str) -> Path:
    """A path from a recipe, with ``~`` and ``${VARIABLE}`` expanded.

    Args:
        text: As it stands in the recipe.
        setting: What to call it in errors, e.g. ``data_source jsonl: path``.

    Raises:
        ConfigError: A variable is not set.
    """

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"{setting} is {text!r}, but the environment variable {match[1]} is not set; set it, or write the path out")
        return os.environ[match[1]]

    return Path(re.sub(r"\$\{(\w+)\}", variable, text)).expanduser()


def lacking(library: str | None, find: Callable[[], Any]) -> list[str]:
    """What a source lacks on this machine, for ``PluginConfig.missing``.

    Args:
        library: Module that it reads with, one that an extra brings; None if it needs none.
        find: Finds the files, or raises the ConfigError that says which are not there.
    """
    found = [f"{library} is not installed; pip install '{EXTRAS[library]}'"] if library is not None and not find_spec(library) else []
    try:
        find()
    except ConfigError as error:
        found.append(str(error))
    return found
