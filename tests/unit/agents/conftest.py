"""Playing an environment by the loop's own ``turns``, with an engine that says what a test wrote down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from miles_core.protocols import Environment, GenerateRequest, Generation, Prompt, SamplingParams, Trajectory
from miles_core.rollouts.turns import turns
from miles_core.sample import Sample, SampleId


@dataclass
class Recital:
    """An engine that recites a text token by token; it stops where a real one would."""

    tokenizer: object
    text: str
    said: int = 0
    version: int = 0
    ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = self.tokenizer.encode(self.text)

    async def generate(self, request: GenerateRequest) -> Generation:
        tokens: list[int] = []
        finish = "length"
        while len(tokens) < request.sampling.max_tokens:
            tokens.append(self.ids[self.said])
            self.said += 1
            text = self.tokenizer.decode(tokens)
            if tokens[-1] == self.tokenizer.eos_token_id or any(stop in text for stop in request.sampling.stop):
                finish = "stop"
                break
        n = len(tokens)
        return Generation(np.array(tokens, np.int32), np.full(n, -0.5, np.float32), np.zeros(n, np.int32), finish)

    async def release(self, session: str) -> None:
        assert session


@pytest.fixture
def play():
    """``await play(tokenizer, environment, prompt, "what the policy says<eos>")`` → the sample."""

    async def run(tokenizer, environment: Callable[[], Environment], prompt: Prompt, policy: str, max_tokens: int = 10_000) -> Sample:
        engine = Recital(tokenizer, policy)
        trajectory = Trajectory(
            prompt=prompt,
            id=SampleId("run", "policy", prompt.id, prompt.id),
            key=1,
            engines={"policy": engine},
            tokenizers={"policy": tokenizer},
            sampling=SamplingParams(max_tokens=max_tokens),
            environment=environment,
        )
        (sample,) = await turns(trajectory, max_turns=64)
        sample.validate()
        return sample

    return run


def trained_texts(tokenizer, sample: Sample) -> Iterator[str]:
    """The text of each turn that is trained."""
    for turn in sample.turns:
        if sample.loss_mask[turn.start : turn.end].all():
            yield tokenizer.decode(sample.tokens[turn.start : turn.end].tolist())


@pytest.fixture
def trained():
    """``trained(tokenizer, sample)`` → the texts that are trained, turn by turn."""
    return lambda tokenizer, sample: list(trained_texts(tokenizer, sample))
