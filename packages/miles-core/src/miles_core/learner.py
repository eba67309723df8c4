"""What happens to a policy's samples between the buffer and the trainer, in one place and on the whole batch (DESIGN §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .batch import Batch
from .config import ModelConfig, StageConfig
from .errors import ConfigError, DataError
from .plan import optimizer_steps, unit_of_all
from .prefixes import mean_over_branches, row_owners, train_once
from .protocols import Advantage, Correction, Kl, SampleFilter, StepReport, Trainer, Unit
from .refs import SampleRef
from .waiting import deadline


@dataclass
class Learner:
    """One policy, or reward model that learns, and the models that serve it (critic, references, teachers).

    Attributes:
        policy: Its name.
        stage: The stage's configuration.
        trainers: The policy's and its servants', by model name.
        advantage: The built advantage, None for losses that need none (SFT).
        filters: Sample filters by name.
        seed: The run's seed.
        corrections: Built corrections by name, in their order.
        kl_reward: The built KL estimator and coefficient of a penalty in the reward, None without.
        metrics: What was noticed about the batch in hand.
        trained_something: Whether a model has taken its step on the batch in hand.
        seen: Columns of the batch in hand that its trainers computed while they trained and nobody had asked for.
    """

    policy: str
    stage: StageConfig
    trainers: Mapping[str, Trainer]
    advantage: Advantage | None
    filters: Mapping[str, SampleFilter]
    seed: int
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    kl_reward: tuple[Kl, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    trained_something: bool = False
    seen: dict[str, np.ndarray] = field(default_factory=dict)

    def model(self, name: str) -> ModelConfig:
        """A model's configuration."""
        return self.stage.models[name]

    @property
    def unit(self) -> Unit:
        """What stays together in an optimizer step: pairs and groups if one of the losses is a function of them."""
        return unit_of_all(loss.unit for name in self.trainers for loss in self.model(name).losses.values())

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each named part in the reward."""
        return {"environment": self.stage.environment_weight} | {name: reward.weight for name, reward in self.stage.rewards.items()}

    def prepare(self, refs: Sequence[SampleRef], step: int) -> Batch:
        """Which samples are trained, and in which optimizer steps. Shared prefixes are trained once."""
        batch = Batch.of(refs)
        self.metrics = {}
        for name, keep in self.filters.items():
            out = [s for s, ref in enumerate(batch.refs) if _taken_out(name, keep(ref.get()), ref)]
            self.metrics[f"filtered/{name}"] = len(out) / len(batch)
            mask = batch.array("loss_mask").copy()
            mask[batch.rows_of(np.array(out, np.int64))] = False
            batch = batch.with_columns({"loss_mask": mask}).counted()
        batch = replace(batch, owners=row_owners(batch))
        if self.advantage is not None:
            self.metrics["groups/of_one"] = _groups_of_one(batch)
        seed_parts = (self.seed, self.policy, step)
        steps = optimizer_steps(batch, self.unit, epochs=self.stage.epochs, minibatches=self.stage.minibatches, seed_parts=seed_parts)
        return batch.with_steps(steps)

    async def annotate(self, batch: Batch) -> Batch:
        """Add the columns that the algorithms need and models give: old, reference, values. Nothing else is computed."""
        steps = self.stage.epochs * self.stage.minibatches
        needs = frozenset().union(*(self.model(n).required(steps) for n in self.trainers if self.model(n).learns))
        for name, trainer in self.trainers.items():
            wanted = frozenset(needs & ROLE_GIVES[self.model(name).role])
            if wanted:
                what = f"model {name} to annotate {', '.join(sorted(wanted))}"
                batch = await deadline(trainer.annotate(batch, wanted), self.stage.deadlines.train, "the loop", what)
        return batch

    def advantages(self, batch: Batch) -> Batch:
        """Advantages of the whole batch, then corrections and what losses want to know of it.

        A row that branches share is trained once, with the mean of the branches' advantages.
        """
        if self.advantage is not None:
            from .algorithms.credit import advantage_columns

            added = advantage_columns(batch, self.advantage, self.reward_weights, self.kl_reward, self.metrics)
            if batch.owners is not None:
                added = {n: mean_over_branches(c, batch.owners) for n, c in added.items()}
            batch = batch.with_columns(added)
        if batch.owners is not None:
            batch = train_once(batch, batch.owners)
        if self.corrections:
            from .algorithms.credit import corrected

            batch = corrected(batch, self.corrections, self.metrics)
        for name, loss in [item for model in self.trainers for item in self.model(model).losses.items()]:
            added = loss.columns_from(batch, self.seed)
            if taken := added.keys() & batch.columns.keys():
                raise ConfigError(f"loss {name!r} adds the column {min(taken)!r}, which another has added; use one of the two")
            batch = batch.with_columns(added) if added else batch
        return batch

    async def step(self, batch: Batch, stage_step: int) -> dict[str, float]:
        """Train the policy and its critic on the batch; metrics by name (a critic's under its own name).

        Args:
            batch: With all columns.
            stage_step: Steps of the stage that are done; models that are frozen until later are left out.
        """
        metrics = dict(self.metrics)
        self.seen = {}
        for name, trainer in self.trainers.items():
            if self.model(name).learns and stage_step >= self.model(name).frozen_steps:
                what = f"model {name} to train one step"
                report: StepReport = await deadline(trainer.step(batch), self.stage.deadlines.train, "the loop", what)
                self.trained_something = True
                self.seen |= {n: c for n, c in report.columns.items() if n not in batch.columns}
                prefix = "" if name == self.policy else f"{name}/"
                metrics |= {prefix + k: v for k, v in report.metrics.items()} | {f"{prefix}optimizer_steps": report.optimizer_steps}
        return metrics


def _taken_out(name: str, reason: str | None, ref: SampleRef) -> bool:
    if not isinstance(reason, str | None):
        raise DataError(f"sample filter {name!r} gave {reason!r} for sample {ref.id}; it gives None to keep it, or a reason as text")
    return reason is not None


def _groups_of_one(batch: Batch) -> int:
    """Groups with a single trajectory: nothing to compare it with, so group-relative advantages there are 0."""
    pairs = np.unique(np.stack([batch.segments.group, batch.segments.trajectory]), axis=1)
    return int((np.bincount(pairs[0]) == 1).sum())


ROLE_GIVES = {
    "policy": {"old_logprobs"},
    "critic": {"values"},
    "reference": {"ref_logprobs"},
    "teacher": {"teacher_logprobs"},
    "reward": set(),
}
"""The columns that a model of each role is asked for."""
