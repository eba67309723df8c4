"""What the loop asks of its parts. A part is any object with these methods; nothing is inherited.

Shapes: T tokens of one sample, N rows and S samples of a packed Batch, L MoE layers, K experts a token, V vocabulary.
"Raises MilesError" means: a sentence for the user, the run stops. ``InfrastructureFailure`` means: issue it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from .sample import Group, Sample, SampleId, SamplingSpan

if TYPE_CHECKING:  # torch is an extra; protocols only name its Tensor
    from torch import Tensor

    from .algorithms.segments import SegmentOps
    from .batch import Batch

# ---- prompts and text -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """A piece of a demonstration: its text, who speaks it, and whether SFT trains on it."""

    text: str
    trained: bool
    role: str = "assistant"


@dataclass(frozen=True)
class Prompt:
    """One row of a data source.

    Attributes:
        id: Stable and unique in its source (randomness and ledgers are keyed by it).
        text: What the policy reads first.
        label: What rewards compare with.
        demonstration: What SFT trains on after ``text``; empty where there is none.
        metadata: Anything else, JSON-like.
    """

    id: str
    text: str
    label: Any = None
    demonstration: tuple[Passage, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Tokenizer(Protocol):
    """Text ↔ token ids; a Hugging Face fast tokenizer is one."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        ...

    def __len__(self) -> int:
        """Vocabulary size, added tokens included."""
        ...


class DataSource(Protocol):
    """Prompts by index. A source is stateless: where a run is in it is the loop's cursor, so that resume is exact."""

    def __len__(self) -> int:
        """Prompts in one epoch. The loop shuffles, with a seed, and starts over at the end.

        Raises DataError when the source is empty.
        """
        ...

    def __getitem__(self, index: int) -> Prompt:
        """The prompt at ``index`` of the unshuffled source. Raises DataError naming file and line of a malformed row."""
        ...


# ---- rollout --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 leave the support unrestricted; temperature 0 is greedy.

    Attributes:
        max_tokens: Most tokens one call may generate.
        stop: Texts that end generation once they appear in what was generated (they stay part of it).
        stop_token_ids: Ids that end generation (they stay part of it); the end-of-text id is always one.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def span(self, start: int, end: int) -> SamplingSpan:
        """The record of these settings on a Sample."""
        return SamplingSpan(start, end, self.temperature, self.top_p, self.top_k, self.min_p)


@dataclass(frozen=True)
class GenerateRequest:
    """Continue a token sequence.

    Attributes:
        session: The trajectory's name; an engine may keep its KV cache under it until ``release``.
        tokens: int32 [T], the WHOLE context, T ≥ 1: earlier turns and injected tokens included.
        sampling: How to draw.
        key: 64-bit randomness key; the token at index t is drawn with ``uniform(key, t)``.
        routing_start: Routing rows before this one are already recorded and not wanted again.
    """

    session: str
    tokens: np.ndarray
    sampling: SamplingParams
    key: int
    routing_start: int = 0


@dataclass(frozen=True)
class Generation:
    """What was sampled after ``request.tokens``.

    Attributes:
        tokens: int32 [n].
        logprobs: float32 [n], under the distribution each was sampled from (temperature and support applied).
        versions: int32 [n], weight version that sampled each.
        finish: ``stop`` (end of text, a stop id or text), ``length`` (max_tokens or the context limit), ``abort``.
        routing: uint8 / uint16 [T + n − 1 − routing_start, L, K], or None for dense models; row r belongs to the token at index
            ``routing_start + r`` as an input.
        support: For each sampled token the ids it could be drawn from, where sampling was restricted; else None.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish: Literal["stop", "length", "abort"]
    routing: np.ndarray | None = None
    support: list[list[int]] | None = None


class WeightSource(Protocol):
    """Gives weights: a trainer."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of every weight, in a fixed order, in the dtype the forward pass uses. Tied weights once."""
        ...


class WeightSink(Protocol):
    """Takes weights: an engine."""

    version: int
    """Version of the weights it serves."""

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights in place; tokens sampled from here on carry ``version``.

        Raises:
            DataError: A name is unknown or missing, or a shape or dtype does not fit; nothing was changed.
        """
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What it now holds, by the names of ``update_weights``."""
        ...


class WeightTransport(Protocol):
    """Carries weights from a trainer to engines and proves that they arrived."""

    async def publish(self, source: WeightSource, sinks: list[Any], version: int) -> dict[str, float]:
        """Give every sink the source's weights as ``version``, verify, and return metrics (bytes, seconds).

        Raises RunError naming the sink when what it holds differs from what was sent.
        """
        ...


class RolloutEngine(WeightSink, Protocol):
    """Samples tokens from a policy. Calls run concurrently; the engine batches them."""

    async def generate(self, request: GenerateRequest) -> Generation:
        """Sample a continuation.

        Raises:
            DataError: A token id is outside the vocabulary, the context is empty, or it is longer than the engine takes.
            InfrastructureFailure: The engine died; the trajectory is issued again.
        """
        ...

    async def release(self, session: str) -> None:
        """Forget a session's cache. Unknown sessions are fine."""
        ...

    async def close(self) -> None:
        """Stop; processes, threads and memory are gone afterwards."""
        ...


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


@dataclass(frozen=True)
class Players:
    """Who samples in a stage.

    Attributes:
        run, seed: Of the run.
        policies: Names, the main one first.
        engines, tokenizers, vocab_sizes: By policy.
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
        """The group's samples, all of them ended. Raises InfrastructureFailure to have the group issued again."""
        ...


class Reward(Protocol):
    """Scores samples. A function of one sample, a group or a batch of samples (its ``unit`` says which), sync or async."""

    def __call__(self, sample: Any) -> Any:
        """``unit: sample``: Sample → float. ``group`` / ``batch``: list[Sample] → one float for each. All finite."""
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


# ---- algorithms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage is computed from; the whole batch, on the controller.

    Attributes:
        rewards: float [S], one a sample; samples of one trajectory carry the same.
        columns: Packed columns [N] by name (``versions``, ``logprobs``, ``values`` …), rolled.
        ops: Reductions; ``ops.mask`` is the loss mask.
    """

    rewards: Tensor
    columns: Mapping[str, Tensor]
    ops: SegmentOps


class Advantage(Protocol):
    """Advantages of a whole batch."""

    def __call__(self, inputs: AdvantageInputs) -> Tensor | dict[str, Tensor]:
        """[N] advantages, or several columns by name (``advantages``, ``returns``)."""
        ...


@dataclass(frozen=True)
class LossInputs:
    """What a loss term is computed from; one micro-batch, on the trainer.

    Attributes:
        logprobs: float [N] of the predicted tokens under the current weights; differentiable.
        entropy: float [N] of the distributions they come from; differentiable.
        columns: Packed columns [N] by name (``old_logprobs``, ``advantages`` …), rolled; ``logprobs`` there are the rollout's.
        ops: Reductions; ``ops.mask`` is the loss mask.
    """

    logprobs: Tensor
    entropy: Tensor
    columns: Mapping[str, Tensor]
    ops: SegmentOps


@dataclass(frozen=True)
class LossOutputs:
    """What a loss term gives.

    Attributes:
        loss: float [N], the loss of each row, before aggregation; rows outside the mask are ignored.
        metrics: float [N] each; the trainer reports their means over the trained rows of the step.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(Protocol):
    """One term of the loss; terms add up."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Loss of each row."""
        ...


class Aggregation(Protocol):
    """How rows add up to the loss of an optimizer step."""

    def __call__(self, ops: SegmentOps) -> Tensor:
        """[N] weights; the step's loss is Σ weight · loss over its trained rows."""
        ...


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepReport:
    """What one call of ``Trainer.step`` did.

    Attributes:
        metrics: By name: loss, grad_norm, lr, entropy, clip_fraction, mismatch …
        optimizer_steps: How many optimizer steps were taken.
    """

    metrics: dict[str, float]
    optimizer_steps: int


class Trainer(WeightSource, Protocol):
    """Holds a model's weights and optimizer. One call at a time."""

    version: int
    """Version of the weights it holds; set by the loop after each publish."""

    async def annotate(self, batch: Batch, columns: frozenset[str]) -> Batch:
        """The batch with the columns added that this model is asked for (``old_logprobs``, ``ref_logprobs``, ``values`` …), rolled."""
        ...

    async def step(self, batch: Batch) -> StepReport:
        """Train on ``batch.optimizer_steps()`` in order.

        Raises:
            DataError: A token id is outside the vocabulary (names the sample).
            RunError: Loss or gradient is not finite; the weights are those before the step.
        """
        ...

    async def save(self, directory: Path) -> None:
        """Write everything ``load`` needs to go on exactly (weights, optimizer, schedule) into an empty directory."""
        ...

    async def load(self, directory: Path) -> None:
        """Go on from what ``save`` wrote. Raises CheckpointError when it does not fit."""
        ...

    async def export(self, directory: Path) -> None:
        """Write the weights as a Hugging Face directory (config, safetensors, tokenizer)."""
        ...

    async def close(self) -> None:
        """Give memory and processes back."""
        ...


# ---- around the loop ------------------------------------------------------------------------------------------------


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
        losses: Built loss terms (for a trainer).
        aggregation: Built aggregation (for a trainer).
        device: ``cpu`` or ``cuda``.
        total_steps: Calls of ``Trainer.step`` in this stage (for schedules).
        stage: The ``StageConfig`` it is built for.
    """

    run_dir: Path
    run: str
    seed: int
    model: str = ""
    model_path: Path | None = None
    tokenizer: Any = None
    losses: Mapping[str, Loss] = field(default_factory=dict)
    aggregation: Aggregation | None = None
    device: str = "cpu"
    total_steps: int = 0
    stage: Any = None
