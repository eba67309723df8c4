"""trainer: holds weights and optimizer. Here the torch trainer, which also says how far a step moved the weights.

In a recipe:

    models: {policy: {trainer: {use: "observed:Observed", norm: 2}}}

Who has a training loop already needs no class: two decorated functions will do (docs/tutorials/pytorch_loop.py).
"""

from typing import ClassVar

from miles_train.plugins import TorchTrainerConfig


class Observed(TorchTrainerConfig):
    """The options: the torch trainer's, and one more. ``miles check`` reads them, so this module imports no torch; the other does."""

    target: ClassVar[str] = "observed_trainer:ObservedTrainer"

    norm: float = 2.0
    """Which norm of the change."""
