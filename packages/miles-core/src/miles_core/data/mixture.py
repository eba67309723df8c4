"""``data_source: mixture``: several sources at once, each with a weight."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..cursor import Cursor
from ..errors import DataError
from ..plugins import PluginConfig, plug
from ..protocols import BuildContext, DataSource, NeedsTokenizer, Prompt
from ..randomness import key, uniform

SOURCE = "source"
"""Metadata that says which part a prompt is of; parts of parts are joined by ``/``."""


class Part(BaseModel):
    """A source and its share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: plug("data_source")  # ty: ignore
    """Any data source, a mixture too."""
    weight: float = Field(gt=0, allow_inf_nan=False)
    """Its share is this, divided by the sum of all weights; how large the source is does not matter."""


class Mixture(PluginConfig):
    """Options of ``data_source: mixture``."""

    point: ClassVar[str] = "data_source"
    target: ClassVar[str] = "miles_core.data.mixture:MixtureSource"

    parts: dict[str, Part] = Field(min_length=1)
    """By name; prompts carry it in ``metadata["source"]`` and before their id."""

    @field_validator("parts")
    @classmethod
    def _names_can_be_joined(cls, parts: dict[str, Part]) -> dict[str, Part]:
        if bad := [name for name in parts if not name or "/" in name]:
            raise ValueError(f"the name of a part is not empty and has no '/', which joins names; found {bad[0]!r}")
        return parts

    def nested(self) -> list[PluginConfig]:
        """This one, and the sources of all parts."""
        return [self, *(inner for part in self.parts.values() for inner in part.data.nested())]


class Draws:
    """Which part each position is of, and how many of that part came before: computed from the position alone.

    Draw j of a part with share s has the time (j + u) / s, where u in [0, 1) is random, its own for every draw; draws come in the
    order of their times. So within any first n positions a part of K has n·s draws, give or take 1 + K·s, in an irregular
    order: every batch is mixed as the weights say, which independent draws would not promise.
    """

    def __init__(self, weights: Mapping[str, float], *parts: str | int) -> None:
        total = sum(weights.values())
        self._shares = [weight / total for weight in weights.values()]
        self._keys = [key("mixture", name, *parts) for name in weights]

    def at(self, position: int) -> tuple[int, int]:
        """(part, draws of it before) of a position."""
        count = len(self._shares)
        early, late = position - count - 1, position + count + 2  # at time t there were between t − count and t + count draws
        before, draws = 0, []
        for part, share in enumerate(self._shares):
            first, end = max(0, int(early * share) - 1), int(late * share) + 2
            before += first
            numbers = np.arange(first, end)
            times = (numbers + uniform(np.full(len(numbers), self._keys[part], np.uint64), numbers)) / share
            draws += zip(times.tolist(), [part] * len(numbers), numbers.tolist(), strict=True)
        _, part, number = sorted(draws)[position - before]
        return part, number


class MixtureSource:
    """The prompts of all parts, one part after another by index; a run goes through them mixed, each part in epochs of its own."""

    def __init__(self, config: Mixture, context: BuildContext) -> None:
        self.config = config
        self._names = list(config.parts)
        self._sources: list[DataSource] = [part.data.build(context) for part in config.parts.values()]
        self._starts = [0, *accumulate(len(source) for source in self._sources)]
        self._draws: dict[int, Draws] = {}

    def use_tokenizer(self, tokenizer: Any) -> list[str]:
        """Hand the model's tokenizer to the parts that need it; what they say, with their names."""
        said = []
        for name, source in zip(self._names, self._sources, strict=True):
            if isinstance(source, NeedsTokenizer):
                said += [f"part {name}: {sentence}" for sentence in source.use_tokenizer(tokenizer)]
        self._starts = [0, *accumulate(len(source) for source in self._sources)]  # prompts may have been left out
        return said

    def __len__(self) -> int:
        return self._starts[-1]

    def place(self, position: int, seed: int, shuffle: bool) -> tuple[int, int]:
        """Epoch of the part that ``position`` draws from, and the prompt's index."""
        if seed not in self._draws:
            self._draws[seed] = Draws({name: part.weight for name, part in self.config.parts.items()}, seed)
        part, own_position = self._draws[seed].at(position)
        cursor = Cursor(self._sources[part], key(seed, "part", self._names[part]), shuffle)
        epoch, index = cursor.place(own_position)
        return epoch, self._starts[part] + index

    def __getitem__(self, index: int) -> Prompt:
        """The prompt at ``index``, with its part's name. Raises DataError when the data has metadata of that name itself."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} rows")
        part = bisect_right(self._starts, index) - 1
        name, source = self._names[part], self._sources[part]
        prompt = source[index - self._starts[part]]
        if isinstance(source, MixtureSource):
            path = f"{name}/{prompt.metadata[SOURCE]}"
        elif SOURCE in prompt.metadata:
            raise DataError(
                f"prompt {prompt.id} of part {name!r} has metadata {SOURCE!r} of its own, where a mixture says which part it is of; "
                "take that field out of metadata_fields"
            )
        else:
            path = name
        return replace(prompt, id=f"{name}/{prompt.id}", metadata=dict(prompt.metadata) | {SOURCE: path})
