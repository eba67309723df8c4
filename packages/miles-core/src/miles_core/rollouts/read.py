"""``rollout: read``: samples from demonstrations instead of generated ones, so that SFT is the same loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..builder import SampleBuilder
from ..errors import DataError
from ..plugins import PluginConfig
from ..protocols import BuildContext, Passage, Prompt, RolloutContext, Tokenizer
from ..sample import Sample, SampleId, Status


class Read(PluginConfig):
    """Options of ``rollout: read``."""

    point: ClassVar[str] = "rollout"
    target: ClassVar[str] = "miles_core.rollouts.read:ReadDemonstrations"
    group_size: ClassVar[int] = 1

    max_length: int | None = None
    """A longer demonstration is an error, never cut silently."""


def read_sample(id: SampleId, prompt: Prompt, passages: Sequence[Passage], tokenizer: Tokenizer, limit: int | None) -> Sample:
    """The prompt's text, then the passages, the trained ones under the loss mask, end of text last.

    Raises DataError when it has more than ``limit`` tokens.
    """
    builder = SampleBuilder(id, tokenizer)
    builder.inject(prompt.text, role="user")
    for passage in passages:
        builder.inject(passage.text, role=passage.role, trained=passage.trained)
    if tokenizer.eos_token_id is not None and passages[-1].trained:
        builder.inject_ids([tokenizer.eos_token_id], role="assistant", trained=True)
    if limit is not None and len(builder.tokens) > limit:
        raise DataError(f"prompt {prompt.id}: an answer to read has {len(builder.tokens)} tokens, more than max_length {limit}")
    return builder.finish(Status.COMPLETED, prompt=prompt.text, label=prompt.label, metadata=dict(prompt.metadata))


class ReadDemonstrations:
    """One sample a prompt: its demonstration."""

    def __init__(self, config: Read, context: BuildContext):
        self.config = config

    async def __call__(self, prompt: Prompt, context: RolloutContext) -> list[Sample]:
        """The sample. Raises DataError when the prompt has no demonstration or it is too long."""
        if not prompt.demonstration:
            raise DataError(f"prompt {prompt.id} has no demonstration to read; rollout 'read' needs data with demonstrations")
        policy = context.policies[0]
        return [read_sample(context.sample_id(prompt, 0), prompt, prompt.demonstration, context.tokenizers[policy], self.config.max_length)]
