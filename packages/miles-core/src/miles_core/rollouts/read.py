"""``rollout: read``: samples from demonstrations instead of generated ones, so that SFT is the same loop."""

from __future__ import annotations

from typing import ClassVar

from ..builder import SampleBuilder
from ..errors import DataError
from ..plugins import PluginConfig
from ..protocols import BuildContext, Prompt, RolloutContext
from ..sample import Sample, SampleId, Status


class Read(PluginConfig):
    """Options of ``rollout: read``."""

    point: ClassVar[str] = "rollout"
    target: ClassVar[str] = "miles_core.rollouts.read:ReadDemonstrations"
    group_size: ClassVar[int] = 1

    max_length: int | None = None
    """A longer demonstration is an error, never cut silently."""


class ReadDemonstrations:
    """One sample a prompt: its text, then its demonstration, the trained passages under the loss mask, end of text last."""

    def __init__(self, config: Read, context: BuildContext):
        self.config = config

    async def __call__(self, prompt: Prompt, context: RolloutContext) -> list[Sample]:
        """The sample. Raises DataError when the prompt has no demonstration or it is too long."""
        if not prompt.demonstration:
            raise DataError(f"prompt {prompt.id} has no demonstration to read; rollout 'read' needs data with demonstrations")
        policy = context.policies[0]
        tokenizer = context.tokenizers[policy]
        builder = SampleBuilder(SampleId(context.run, policy, prompt.id, context.group), tokenizer)
        builder.inject(prompt.text, role="user")
        for passage in prompt.demonstration:
            builder.inject(passage.text, role=passage.role, trained=passage.trained)
        if tokenizer.eos_token_id is not None and prompt.demonstration[-1].trained:
            builder.inject_ids([tokenizer.eos_token_id], role="assistant", trained=True)
        limit = self.config.max_length
        if limit is not None and len(builder.tokens) > limit:
            raise DataError(f"prompt {prompt.id}: its demonstration has {len(builder.tokens)} tokens, more than max_length {limit}")
        return [builder.finish(Status.COMPLETED, prompt=prompt.text, label=prompt.label, metadata=dict(prompt.metadata))]
