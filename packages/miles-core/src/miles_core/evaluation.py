"""``evaluator: sampled``: play held-out prompts with sampling of its own; avg@k and pass@k."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from .errors import InfrastructureFailure, RunError
from .plugins import PluginConfig, plug
from .protocols import BuildContext, DataSource, Evaluation, Players, Prompt, Rollout
from .rollouts.trajectories import Sampling, Trajectories
from .sample import Group, Sample, Status
from .scoring import Scorer
from .waiting import gather, in_daemon_thread


class Sampled(PluginConfig):
    """Options of ``evaluator: sampled``."""

    point: ClassVar[str] = "evaluator"
    target: ClassVar[str] = "miles_core.evaluation:SampledEvaluator"

    data: plug("data_source")  # ty: ignore
    """Held-out prompts."""
    prompts: int | None = Field(None, gt=0)
    """Only the first so many; all by default."""
    rollout: plug("rollout") | None = None  # ty: ignore
    """How they are played, ``trajectories`` with options; the stage's rollout by default."""
    rewards: dict[str, plug("reward")] | None = None  # ty: ignore
    """What they are scored by beside the environment, whose part weighs 1; the stage's rewards and weights by default."""
    samples: int = Field(1, gt=0)
    """Trajectories a prompt: the k of avg@k and pass@k."""
    sampling: Sampling | None = None
    """Sampling settings; the stage's by default."""
    success: float = 1.0
    """A trajectory succeeds when its reward is at least this."""

    def problems(self, stage: Any) -> list[str]:
        """It plays trajectories with the engine of the main policy."""
        found = []
        if self.rollout is not None and not isinstance(self.rollout, Trajectories):
            found.append(f"its rollout must be 'trajectories', not {self.rollout.use!r}")
        if self.rollout is None and not isinstance(stage.rollout, Trajectories):
            found.append(f"it plays the stage's rollout, which must be 'trajectories', not {stage.rollout.use!r}; or give it a rollout")
        if any(m.role == "policy" and m.engine is None for m in stage.models.values()):
            found.append("it samples, but the policy has no engine; add e.g. engine: {use: local} to the model")
        return found


class SampledEvaluator:
    """Plays prompts with the stage's rollout and rewards, the same randomness each time, so that curves are comparable."""

    def __init__(self, config: Sampled, context: BuildContext):
        played = config.rollout or context.stage.rollout
        assert isinstance(played, Trajectories)  # see ``Sampled.problems``
        own = {"group_size": config.samples} | ({"sampling": config.sampling} if config.sampling else {})
        self.config = config
        self.data: DataSource = config.data.build(context)
        self.rollout: Rollout = played.model_copy(update=own).build(context)
        stage = context.stage
        by_stage = config.rewards is None
        self.scorer = Scorer(stage.rewards, context, stage.environment_weight) if by_stage else Scorer(config.rewards, context)

    async def evaluate(self, players: Players) -> Evaluation:
        """Metrics: ``avg@k`` (mean success), ``pass@k`` (prompts with a success), reward, length, truncated (shares and means)."""
        count = min(self.config.prompts or len(self.data), len(self.data))
        prompts = await in_daemon_thread(lambda: [self.data[index] for index in range(count)])
        groups = await gather(self._group(players, prompt) for prompt in prompts)
        samples = [s for group in groups for s in group]
        if self.scorer.has_batch_rewards:
            await self.scorer.score_batch(samples)
        rewards = np.array(
            [[r for of_policy in Group("", group).rewards().values() for r in of_policy] for group in groups]
        )  # [prompts, k]
        success = rewards >= self.config.success
        k = self.config.samples
        metrics = {
            f"avg@{k}": float(success.mean()),
            "reward": float(rewards.mean()),
            "length": float(np.mean([s.n_sampled for s in samples])),
            "truncated": float(np.mean([s.status == Status.TRUNCATED for s in samples])),
        }
        if k > 1:
            metrics[f"pass@{k}"] = float(success.any(axis=1).mean())
        return Evaluation(metrics, samples)

    async def _group(self, players: Players, prompt: Prompt) -> list[Sample]:
        samples = await self.rollout(prompt, players.context(f"eval-{prompt.id}", -1, evaluating=True))
        try:
            await self.scorer.score_group(samples)
        except InfrastructureFailure as failure:  # an evaluation is not issued again
            raise RunError(str(failure)) from failure
        return samples
