"""rollout: a whole group, from a prompt to its samples. Here nothing is sampled: demonstrations are read.

In a recipe:

    stages: {sft: {rollout: {use: "dictation:dictation", end: true}}}
"""

from miles_core import Status
from miles_core.builder import SampleBuilder


async def dictation(prompt, context, *, end: bool = True):
    """One sample: the prompt, then what the demonstration says. ``end``: whether it learns to stop after it.

    One that samples asks ``context.engines`` for tokens. A plain function would do as well: it is called in a thread.
    """
    tokenizer = context.tokenizers[context.policies[0]]
    builder = SampleBuilder(context.sample_id(prompt, trajectory=0), tokenizer)
    builder.inject(prompt.text, role="user")
    for passage in prompt.demonstration:
        builder.inject(passage.text, role=passage.role, trained=passage.trained)
    if end:
        builder.inject_ids([tokenizer.eos_token_id], role="assistant", trained=True)
    return [builder.finish(Status.COMPLETED, prompt=prompt.text, label=prompt.label)]
