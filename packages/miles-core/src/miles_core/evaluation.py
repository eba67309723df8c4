"""``evaluator: sampled``: play held-out prompts with sampling of its own; avg@k and pass@k."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from .errors import ConfigError
from .plugins import PluginConfig, plug
from .protocols import BuildContext, DataSource, Evaluation, Players, Rollout
from .rollouts.trajectories import Sampling, Trajectories
from .sample import Sample, Status, trajectory_reward
from .scoring import Scorer
from .waiting import gather


class Sampled(PluginConfig):
    """Options of ``evaluator: sampled``."""

    point: ClassVar[str] = "evaluator"
    target: ClassVar[str] = "miles_core.evaluation:SampledEvaluator"

    data: plug("data_source")  # ty: ignore
    """Held-out prompts."""
    prompts: int | None = Field(None, gt=0)
    """Only the first so many; all by default."""
    samples: int = Field(1, gt=0)
    """Trajectories a prompt: the k of avg@k and pass@k."""
    sampling: Sampling | None = None
    """Sampling settings; the stage's by default."""
    success: float = 1.0
    """A trajectory succeeds when its reward is at least this."""


class SampledEvaluator:
    """Plays prompts with the stage's rollout and rewards, the same randomness each time, so that curves are comparable."""

    def __init__(self, config: Sampled, context: BuildContext):
        stage_rollout = context.stage.rollout
        if not isinstance(stage_rollout, Trajectories):
            raise ConfigError(f"evaluator 'sampled' plays the stage's rollout; it needs rollout 'trajectories', not {stage_rollout.use!r}")
        own = {"group_size": config.samples} | ({"sampling": config.sampling} if config.sampling else {})
        self.config = config
        self.data: DataSource = config.data.build(context)
        self.rollout: Rollout = stage_rollout.model_copy(update=own).build(context)
        self.scorer = Scorer(context.stage.rewards, context)

    async def evaluate(self, players: Players) -> Evaluation:
        """Metrics: ``avg@k`` (mean success), ``pass@k`` (prompts with a success), reward, length, truncated (shares and means)."""
        count = min(self.config.prompts or len(self.data), len(self.data))
        groups = await gather(self._group(players, index) for index in range(count))
        samples = [s for group in groups for s in group]
        success = np.array([[trajectory_reward([s]) >= self.config.success for s in group] for group in groups])
        k = self.config.samples
        metrics = {
            f"avg@{k}": float(success.mean()),
            "reward": float(np.mean([trajectory_reward([s]) for s in samples])),
            "length": float(np.mean([s.n_sampled for s in samples])),
            "truncated": float(np.mean([s.status == Status.TRUNCATED for s in samples])),
        }
        if k > 1:
            metrics[f"pass@{k}"] = float(success.any(axis=1).mean())
        return Evaluation(metrics, samples)

    async def _group(self, players: Players, index: int) -> list[Sample]:
        prompt = self.data[index]
        samples = await self.rollout(prompt, players.context(f"eval-{prompt.id}", -1, evaluating=True))
        await self.scorer.score_group(samples)
        return samples
