"""The safetensors of a Hugging Face directory, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from miles_core.errors import ConfigError

INDEX = "model.safetensors.index.json"
FLOATS = frozenset({"BF16", "F16", "F32", "F64"})


class CheckpointFiles:
    """A context manager over the directory's files; which one holds a weight is known from its index or, without one, from the files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._slices: dict[str, Any] = {}

    def __enter__(self) -> CheckpointFiles:
        """Open every file; nothing but their headers is read yet. Raises ConfigError if there are none or one cannot be read."""
        for file in self._files():
            try:
                opened = self._stack.enter_context(safe_open(file, "pt"))
                self._slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
            except (OSError, SafetensorError) as error:
                self._stack.close()
                raise ConfigError(f"{file} cannot be read: {error}. The download or export is incomplete; get the model again") from error
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._slices.clear()

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Collection[str]) -> None:
        """Raise a ConfigError unless the files hold exactly these weights with these shapes in a floating-point format.

        ``ignored`` may be there too: a tied weight that was written twice.
        """
        found = self._slices
        if missing := [name for name in expected if name not in found]:
            raise ConfigError(f"{self._path} lacks {len(missing)} weights, the first is {missing[0]!r}; export it again")
        if unknown := sorted(found.keys() - expected.keys() - set(ignored)):
            raise ConfigError(
                f"{self._path} holds {len(unknown)} weights that its config.json and the architecture's table have no place for, the first "
                f"is {unknown[0]!r}; the model would not be the one that was saved"
            )
        for name, shape in expected.items():
            have, dtype = tuple(found[name].get_shape()), found[name].get_dtype()
            if have != shape:
                raise ConfigError(
                    f"{self._path}: {name!r} is {list(have)}, by config.json it is {list(shape)}; they do not belong together"
                )
            if dtype not in FLOATS:
                raise ConfigError(f"{self._path}: {name!r} is {dtype}; quantised checkpoints cannot be trained, use the original one")

    def read(self, name: str, axis: int, start: int, stop: int) -> Tensor:
        """``start`` to ``stop`` along axis 0 or 1 of a weight."""
        return self._slices[name][(slice(None),) * axis + (slice(start, stop),)]

    def _files(self) -> list[Path]:
        index = self._path / INDEX
        try:
            names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else None
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} is not an index of safetensors: {error!r}; get the model again") from error
        files = sorted(self._path.glob("*.safetensors")) if names is None else [self._path / name for name in sorted(names)]
        if not files:
            raise ConfigError(f"{self._path} has no *.safetensors; a model's path is a Hugging Face directory with its weights")
        return files
