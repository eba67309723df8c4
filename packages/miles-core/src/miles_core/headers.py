"""Headers of safetensors files, read without their library: what is in a file, in no time, and whether it is all there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

LONGEST = 100_000_000
"""Bytes; the format's own limit."""
AGAIN = "The download or export is incomplete; get the model again"


@dataclass(frozen=True)
class Header:
    """What the header of a file says.

    Attributes:
        tensors: ``dtype``, ``shape`` and ``data_offsets`` of every tensor by name.
        metadata: Texts by name; whatever who wrote the file wanted to say.
        begin: Byte of the file from which offsets count.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    begin: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor by name."""
        return {name: tuple(entry["shape"]) for name, entry in self.tensors.items()}


def read_header(file: Path) -> Header:
    """The header of a safetensors file. Raises a ConfigError if there is none, or the file is longer or shorter than it says."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > LONGEST:
                raise ValueError(f"its header would have {length:,} bytes")
            tensors = json.loads(stream.read(length))
        metadata = tensors.pop("__metadata__", {})
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        header, size = Header(tensors, metadata, 8 + length), file.stat().st_size
        if not all(isinstance(entry["shape"], list) for entry in tensors.values()):
            raise ValueError("a tensor has no shape")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{file} cannot be read: {type(error).__name__}: {error}. {AGAIN}") from error
    if size != end:
        raise ConfigError(f"{file} cannot be read: it has {size:,} bytes, its header says {end:,}. {AGAIN}")
    return header
