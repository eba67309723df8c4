"""Around the loop: trackers, evaluators, and what a plug-in may use when it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..lora import Lora
from ..sample import Sample
from .algorithms import Aggregation, LossTerm
from .cluster import Cluster
from .rollout import Players


class Tracker(Protocol):
    """Takes metrics somewhere."""

    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """One row; called once a step."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator found: metrics by name (``avg@4``), and the samples it looked at (written beside the trajectories)."""

    metrics: dict[str, float]
    samples: list[Sample] = field(default_factory=list)


class Evaluator(Protocol):
    """Measures a policy on data of its own."""

    async def evaluate(self, players: Players) -> Evaluation:
        """Evaluate the weights that the engines of ``players`` serve."""
        ...


@dataclass
class BuildContext:
    """What a plug-in may use when it is built.

    Attributes:
        run_dir: The run's directory.
        run: The run's name.
        seed: The run's seed.
        model: Name of the model it is built for ("" outside models).
        model_path: Hugging Face directory with that model's starting weights and tokenizer.
        tokenizer: That model's tokenizer.
        role: That model's role (policy, critic, reference, teacher, reward).
        losses: Built loss terms by name (for a trainer).
        aggregation: Built aggregation (for a trainer).
        device: ``cpu`` or ``cuda``.
        bitwise: Whether a token's numbers must have the same bits in any batch, in engine and trainer (``numerics: bitwise``).
        total_steps: Calls of ``Trainer.step`` in this stage (for schedules).
        stage: The ``StageConfig`` it is built for.
        cluster: Starts the processes that a model is spread over; None where nothing may be started.
        lora: The adapter of that model, beside the frozen weights in ``model_path``; None where all weights are the model's own.
        stage_name: Its name; models that stages before trained are in ``run_dir/models/<stage_name>``.
    """

    run_dir: Path
    run: str
    seed: int
    model: str = ""
    model_path: Path | None = None
    tokenizer: Any = None
    role: str = "policy"
    losses: Mapping[str, LossTerm] = field(default_factory=dict)
    aggregation: Aggregation | None = None
    device: str = "cpu"
    bitwise: bool = False
    total_steps: int = 0
    stage: Any = None
    cluster: Cluster | None = None
    stage_name: str = ""
    lora: Lora | None = None
