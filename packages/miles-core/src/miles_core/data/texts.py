"""``data_source: texts``: prompts written in the recipe, or handed over by ``miles.run``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..plugins import PluginConfig
from ..protocols import BuildContext, Prompt


class Texts(PluginConfig):
    """Options of ``data_source: texts``."""

    point: ClassVar[str] = "data_source"
    target: ClassVar[str] = "miles_core.data.texts:TextSource"

    texts: tuple[str, ...] = Field(min_length=1)
    """One prompt each; its id is its index."""


class TextSource:
    """The texts in their order."""

    def __init__(self, config: Texts, context: BuildContext):
        self.config = config

    def __len__(self) -> int:
        return len(self.config.texts)

    def __getitem__(self, index: int) -> Prompt:
        """The text at ``index``."""
        return Prompt(id=str(index), text=self.config.texts[index])
