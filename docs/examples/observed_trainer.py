"""What ``observed.py`` names: imported when the trainer is built."""

from dataclasses import replace

import torch

from miles_train.torch_trainer.trainer import TorchTrainer


class ObservedTrainer(TorchTrainer):
    """Built with its options (``self.config``) and a BuildContext (``self.context``: model, losses, device …)."""

    async def step(self, batch):
        before = [weight.clone() for _, weight in self.named_weights()]
        report = await super().step(batch)
        change = torch.cat([(new - old).flatten() for old, (_, new) in zip(before, self.named_weights(), strict=True)])
        return replace(report, metrics=report.metrics | {"moved": float(change.norm(self.config.norm))})
