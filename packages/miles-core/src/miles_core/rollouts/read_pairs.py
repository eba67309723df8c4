"""``rollout: read_pairs``: a better and a worse answer to each prompt, for DPO and reward models."""

from __future__ import annotations

from typing import ClassVar

from ..errors import DataError
from ..plugins import PluginConfig
from ..protocols import BuildContext, Prompt, RolloutContext
from ..sample import Sample
from .read import read_sample


class ReadPairs(PluginConfig):
    """Options of ``rollout: read_pairs``."""

    point: ClassVar[str] = "rollout"
    target: ClassVar[str] = "miles_core.rollouts.read_pairs:ReadAnswerPairs"
    gives: ClassVar[frozenset[str]] = frozenset({"pairs", "rewards"})
    group_size: ClassVar[int] = 2

    max_length: int | None = None
    """A longer answer is an error, never cut silently."""


class ReadAnswerPairs:
    """Two trajectories a prompt: its demonstration with reward 1, its rejected answer with reward 0."""

    def __init__(self, config: ReadPairs, context: BuildContext):
        self.config = config

    async def __call__(self, prompt: Prompt, context: RolloutContext) -> list[Sample]:
        """The two samples, the better first. Raises DataError when the prompt has no pair or an answer is too long."""
        policy = context.policies[0]
        samples = []
        for trajectory, (name, passages) in enumerate((("demonstration", prompt.demonstration), ("rejected", prompt.rejected))):
            if not passages:
                raise DataError(f"prompt {prompt.id} has no {name}; rollout 'read_pairs' needs data with a better and a worse answer")
            sample = read_sample(
                context.sample_id(prompt, trajectory), prompt, passages, context.tokenizers[policy], self.config.max_length
            )
            sample.rewards = {"environment": float(name == "demonstration")}
            samples.append(sample)
        return samples
