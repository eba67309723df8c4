"""From a prompt to a group of samples: environments, trajectories, rewards, filters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..randomness import key
from ..sample import Group, Sample, SampleId
from .data import Prompt, Tokenizer
from .engine import RolloutEngine, SamplingParams


@dataclass(frozen=True)
class Observation:
    """What an environment answers.

    Attributes:
        text: Injected into the policy's context (tokenised, never trained).
        done: Whether the trajectory ends here.
        reward: Reward for the trajectory so far, added up over its observations; None adds nothing.
        stop: Texts at which the policy's next turn pauses.
        metadata: Kept on the sample.
    """

    text: str = ""
    done: bool = False
    reward: float | None = None
    stop: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """One trajectory's world; an instance is made for each trajectory."""

    async def reset(self, prompt: Prompt) -> Observation:
        """The first observation: the text the policy sees first. Raises InfrastructureFailure if the world cannot start."""
        ...

    async def step(self, action: str) -> Observation:
        """Answer to what the policy said (its text since the last observation, stop text included)."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """What a generate function is asked for: one trajectory of a prompt.

    Attributes:
        prompt: The prompt.
        id: The sample id to give (further samples of the trajectory replace its ``branch`` or ``policy``).
        key: Randomness key of this trajectory (run seed, policy, epoch, prompt id, sample index, attempt).
        engines: Engine of each policy; ``engines[id.policy]`` is the one in question.
        tokenizers: Tokenizer of each policy.
        sampling: Settings to sample with.
        max_length: Most tokens the sample may have, None: only the engine's limit.
        environment: Makes this trajectory's world; None for single-turn tasks without one.
    """

    prompt: Prompt
    id: SampleId
    key: int
    engines: Mapping[str, RolloutEngine]
    tokenizers: Mapping[str, Tokenizer]
    sampling: SamplingParams
    max_length: int | None = None
    environment: Callable[[], Environment] | None = None


class Generate(Protocol):
    """One trajectory."""

    async def __call__(self, trajectory: Trajectory) -> list[Sample]:
        """Play it and return its samples (usually one). Raises InfrastructureFailure to have it issued again."""
        ...


@dataclass(frozen=True)
class RolloutContext:
    """What a rollout function may use.

    Attributes:
        run: The run's name.
        seed: The run's seed.
        epoch: How often the data source was gone through before this prompt.
        group: Id to give the group.
        policies: Names of the policies that play; the first is the main one.
        engines, tokenizers: By policy.
        evaluating: Whether the samples are for an evaluator, not for training.
        attempt: How often the group had been issued before (after infrastructure failures); for the samples' ids and keys.
    """

    run: str
    seed: int
    epoch: int
    group: str
    policies: tuple[str, ...]
    engines: Mapping[str, RolloutEngine]
    tokenizers: Mapping[str, Tokenizer]
    evaluating: bool = False
    attempt: int = 0

    def sample_id(self, prompt: Prompt, trajectory: int, branch: int = 0) -> SampleId:
        """The id of a sample of the main policy."""
        return SampleId(self.run, self.policies[0], prompt.id, self.group, trajectory, branch, self.attempt)

    def key(self, prompt: Prompt, trajectory: int) -> int:
        """The 64-bit randomness key of a trajectory of the main policy: the same whenever and wherever it is played."""
        return key(self.seed, self.policies[0], self.epoch, prompt.id, trajectory, self.attempt)


@dataclass(frozen=True)
class Players:
    """Who samples in a stage.

    Attributes:
        run, seed: Of the run.
        policies: Names, the main one first.
        engines, tokenizers, vocab_sizes: By policy; policies that a user's own loop trains have no tokenizer here.
    """

    run: str
    seed: int
    policies: tuple[str, ...]
    engines: Mapping[str, RolloutEngine]
    tokenizers: Mapping[str, Tokenizer]
    vocab_sizes: Mapping[str, int]

    def context(self, group: str, epoch: int, *, evaluating: bool = False) -> RolloutContext:
        """What the rollout function of one group gets."""
        return RolloutContext(self.run, self.seed, epoch, group, self.policies, self.engines, self.tokenizers, evaluating)


class Rollout(Protocol):
    """A whole group: everything between a prompt and the samples it gives. Writing one is all a new task type needs."""

    async def __call__(self, prompt: Prompt, context: RolloutContext) -> list[Sample]:
        """The group's samples, all of them ended. Raises InfrastructureFailure to have the group issued again.

        A plain function will do: it is called in a thread.
        """
        ...


@dataclass(frozen=True)
class Score:
    """What a reward may give instead of a number: the number, and what it is made of.

    Attributes:
        reward: The number that counts.
        parts: More numbers by name, kept on the sample as ``<the reward's name>/<part>``. They are metrics and never added up.
    """

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Reward(Protocol):
    """Scores samples. A function of one sample, a group or a batch of samples (its ``unit`` says which), sync or async.

    A plain function is called in a thread; an async one must leave the event loop free, as everything else waits for it there.
    """

    def __call__(self, sample: Any) -> Any:
        """``unit: sample``: Sample → float or ``Score``. ``group`` / ``batch``: list[Sample] → one of these for each. All finite.

        Raises InfrastructureFailure, where a service failed and not the policy, to have the group issued again.
        """
        ...


class GroupFilter(Protocol):
    """Decides which groups are trained on; a dropped group is replaced by a new prompt."""

    def __call__(self, group: Group) -> str | None:
        """None keeps the group; a reason drops it."""
        ...


class SampleFilter(Protocol):
    """Decides which samples are trained on; the others stay in their group's statistics."""

    def __call__(self, sample: Sample) -> str | None:
        """None keeps the sample; a reason clears its loss mask."""
        ...
