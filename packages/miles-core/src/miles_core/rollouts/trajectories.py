"""``rollout: trajectories``: sample a group, each trajectory by the ``generate`` function, failed ones again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InfrastructureFailure, RunError
from ..plugins import PluginConfig, plug
from ..protocols import BuildContext, Environment, Generate, Prompt, RolloutContext, SamplingParams, Trajectory
from ..sample import Sample
from ..waiting import gather


class Sampling(BaseModel):
    """How a rollout samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int = Field(gt=0)
    """Most tokens the policy samples in a trajectory, over all its turns."""
    temperature: float = Field(1.0, ge=0)
    """0: greedy (evaluation only)."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, lt=1)
    stop: tuple[str, ...] = ()

    def params(self) -> SamplingParams:
        """For an engine."""
        return SamplingParams(self.max_tokens, self.temperature, self.top_p, self.top_k, self.min_p, self.stop)


class Trajectories(PluginConfig):
    """Options of ``rollout: trajectories``."""

    point: ClassVar[str] = "rollout"
    target: ClassVar[str] = "miles_core.rollouts.trajectories:SampleTrajectories"
    needs: ClassVar[frozenset[str]] = frozenset({"engine"})

    group_size: int = Field(1, gt=0)
    """Trajectories a prompt."""
    sampling: Sampling
    environment: plug("environment") | None = None  # ty: ignore
    """The world of each trajectory; none for single-turn tasks that rewards score."""
    generate: plug("generate") = Field(default={"use": "turns"}, validate_default=True)  # ty: ignore
    """How one trajectory is played."""
    max_length: int | None = Field(None, gt=0)
    """Most tokens of a whole trajectory, injected ones included."""
    attempts: int = Field(3, gt=0)
    """How often a trajectory is issued when infrastructure fails."""

    def provided(self) -> frozenset[str]:
        """An environment gives rewards; a generate function of one's own may."""
        return frozenset({"logprobs"} | ({"rewards"} if self.environment else set())) | self.generate.provided()

    def problems(self, stage: Any) -> list[str]:
        """Trained tokens need a distribution that the trainer can rebuild (DESIGN §2)."""
        found = []
        if self.sampling.temperature == 0:
            found.append("sampling.temperature is 0: greedy tokens cannot be trained on; use e.g. 1.0")
        if not self.sampling.params().span(0, 1).unrestricted and self.sampling.temperature > 0:
            found.append("sampling restricts the support (top_p, top_k, min_p), over which trainers do not renormalise yet; leave that out")
        return found


class SampleTrajectories:
    """A group of independent trajectories of one prompt by the main policy."""

    def __init__(self, config: Trajectories, context: BuildContext):
        self.config = config
        self.generate: Generate = config.generate.build(context)
        self.environment: Callable[[], Environment] | None = config.environment and config.environment.build(context)

    async def __call__(self, prompt: Prompt, context: RolloutContext) -> list[Sample]:
        """The samples of all trajectories. Raises RunError when one fails ``attempts`` times."""
        groups = await gather(self._trajectory(prompt, context, index) for index in range(self.config.group_size))
        return [sample for samples in groups for sample in samples]

    async def _trajectory(self, prompt: Prompt, context: RolloutContext, index: int) -> list[Sample]:
        for attempt in range(self.config.attempts):
            own = replace(context, attempt=attempt)
            trajectory = Trajectory(
                prompt=prompt,
                id=own.sample_id(prompt, index),
                key=own.key(prompt, index),
                engines=context.engines,
                tokenizers=context.tokenizers,
                sampling=self.config.sampling.params(),
                max_length=self.config.max_length,
                environment=self.environment,
            )
            try:
                return await self.generate(trajectory)
            except InfrastructureFailure as failure:
                last = failure
        raise RunError(f"trajectory {trajectory.id} failed {self.config.attempts} times, last: {last}") from last
