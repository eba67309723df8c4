"""What happens to a policy's samples between the buffer and the trainer, in one place and on the whole batch (DESIGN §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .batch import Batch
from .config import ModelConfig, StageConfig
from .errors import DataError
from .plan import Unit, optimizer_steps
from .prefixes import mean_over_branches, row_owners, train_once
from .protocols import Advantage, AdvantageInputs, SampleFilter, StepReport, Trainer
from .refs import SampleRef
from .waiting import deadline


@dataclass
class Learner:
    """One policy and the models that serve it (critic, references).

    Attributes:
        policy: Its name.
        stage: The stage's configuration.
        trainers: The policy's and its servants', by model name.
        advantage: The built advantage, None for losses that need none (SFT).
        filters: Sample filters by name.
        seed: The run's seed.
    """

    policy: str
    stage: StageConfig
    trainers: Mapping[str, Trainer]
    advantage: Advantage | None
    filters: Mapping[str, SampleFilter]
    seed: int
    _owners: np.ndarray | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def model(self, name: str) -> ModelConfig:
        """A model's configuration."""
        return self.stage.models[name]

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
        self._owners = row_owners(batch)
        if self._owners is not None:
            batch = train_once(batch, self._owners)
        unit: Unit = "sequence"
        seed_parts = (self.seed, self.policy, step)
        steps = optimizer_steps(batch, unit, epochs=self.stage.epochs, minibatches=self.stage.minibatches, seed_parts=seed_parts)
        return batch.with_steps(steps)

    async def annotate(self, batch: Batch) -> Batch:
        """Add the columns that the algorithms need and models give: old, reference, values. Nothing else is computed."""
        needs = {n for m in self.trainers for plugin in self._algorithms(m) for n in plugin.required()}
        for name, trainer in self.trainers.items():
            wanted = frozenset(needs & ROLE_GIVES[self.model(name).role])
            if wanted:
                what = f"model {name} to annotate {', '.join(sorted(wanted))}"
                batch = await deadline(trainer.annotate(batch, wanted), self.stage.deadlines.train, "the loop", what)
        return batch

    def _algorithms(self, name: str) -> list:
        model = self.model(name)
        return [p for p in (model.advantage, *model.losses.values(), model.aggregation) if p is not None and model.learns]

    def advantages(self, batch: Batch) -> Batch:
        """Advantages of the whole batch; rows that branches share get the mean of the branches'."""
        if self.advantage is None:
            return batch
        import torch

        from .algorithms.segments import SegmentOps

        columns = {n: torch.from_numpy(c) for n, c in batch.columns.items() if isinstance(c, np.ndarray)}
        inputs = AdvantageInputs(torch.from_numpy(batch.rewards), columns, SegmentOps.of(batch))
        given = self.advantage(inputs)
        named = given if isinstance(given, dict) else {"advantages": given}
        added = {n: c.to(torch.float32).numpy() for n, c in named.items()}
        if self._owners is not None:
            added = {n: mean_over_branches(c, self._owners) for n, c in added.items()}
        return batch.with_columns(added)

    async def step(self, batch: Batch) -> dict[str, float]:
        """Train the policy and its critic on the batch; metrics by name (a critic's under its own name)."""
        metrics = dict(self.metrics)
        for name, trainer in self.trainers.items():
            if self.model(name).learns:
                what = f"model {name} to train one step"
                report: StepReport = await deadline(trainer.step(batch), self.stage.deadlines.train, "the loop", what)
                prefix = "" if name == self.policy else f"{name}/"
                metrics |= {prefix + k: v for k, v in report.metrics.items()} | {f"{prefix}optimizer_steps": report.optimizer_steps}
        return metrics


def _taken_out(name: str, reason: str | None, ref: SampleRef) -> bool:
    if not isinstance(reason, str | None):
        raise DataError(f"sample filter {name!r} gave {reason!r} for sample {ref.id}; it gives None to keep it, or a reason as text")
    return reason is not None


ROLE_GIVES = {"policy": {"old_logprobs"}, "critic": {"values"}, "reference": {"ref_logprobs"}}
"""The columns that a model of each role is asked for."""
