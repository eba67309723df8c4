"""Trainers and rewards that a recipe may name, and their options. No torch here: `miles check` reads this module."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from miles_core.errors import ConfigError
from miles_core.plugins import RewardConfig, TrainerConfig

MEGATRON = "0.16.1"
"""The megatron-core whose sources are known (megatron/bridge.py)."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class Gates(BaseModel):
    """When a trainer refuses a batch because trainer and rollout engine disagree on tokens that the present weights sampled.

    They are looked at on the first optimizer step of a batch, before it changes a weight. Older tokens are never gated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mismatch: float | None = Field(None, gt=0)
    """Highest ``mismatch/mean_abs``, in nats; ``.inf`` has no bound. None: by the forward pass's dtype, 0.005 in float32 and 0.1 in
    bfloat16 (miles_train.gates says where that comes from)."""
    ess: float = Field(0.3, ge=0, lt=1)
    """Lowest ``mismatch/ess``; 0 has no bound. verl's documentation warns below 0.3."""


class AdamWTrainerConfig(TrainerConfig):
    """What the trainers of this package share: AdamW over float32 masters, its schedule, precision, micro-batches and gates."""

    lr: float = Field(1e-6, gt=0)
    """Highest learning rate, reached after the warm-up."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises linearly to ``lr``."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up (miles_train.schedule)."""
    final_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where a linear or cosine schedule ends, as a part of ``lr``."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger L2 norm are scaled down to it; ``.inf`` never scales."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What the forward pass computes in; None: float32 on a CPU, bfloat16 on a GPU. Master weights, moments and gradient
    accumulation are float32 in any case."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Most rows of a forward pass, padding included. It changes memory and speed, never the gradient."""
    recompute: bool = False
    """Whether activations of each layer are computed again in the backward pass instead of being kept."""
    gates: Gates = Gates()
    """When a batch is refused because rollout engine and trainer disagree; of language models only."""
    routing_replay: bool = True
    """Of a mixture-of-experts policy: take the experts that the rollout engine chose (column ``routing``) wherever they were recorded.
    Strict: a trained token without them is refused. Dense models and other roles have nothing to replay."""
    compare_routing: bool = False
    """Also measure the mismatch with the routers' own choice (``mismatch_own_routing/…``), by one more forward pass of each batch's
    first optimizer step."""

    @model_validator(mode="after")
    def _compared_with_what(self) -> Self:
        if self.compare_routing and not self.routing_replay:
            raise ValueError("compare_routing compares replay with the routers' own choice; set routing_replay: true, or leave it out")
        return self


class TorchTrainerConfig(AdamWTrainerConfig):
    """A Hugging Face model and AdamW: a language model, or one with a scalar head for critics and reward models. In the run's process, or
    over the ranks of the run's cluster."""

    point: ClassVar[str] = "trainer"
    gives: ClassVar[frozenset[str]] = frozenset({"old_logprobs", "ref_logprobs", "teacher_logprobs", "values"})
    """``values`` where the model's role is critic or reward, log-probabilities elsewhere."""
    knows_old_logprobs: ClassVar[bool] = True
    takes_lora: ClassVar[bool] = True

    ranks: int = Field(1, ge=1)
    """Over how many ranks of the run's cluster samples, weights and AdamW's state are spread (FSDP2); 1 is the run's own process. With n
    GPUs that is n; docs/benchmarks.md says what it brings on a CPU. It changes speed and memory, never the gradient; a cut may be resumed
    on another number."""
    layout: Literal["auto", "padded", "packed", "shared"] = "auto"
    """How samples stand in a forward pass: ``padded`` to the longest; ``packed`` end to end; ``shared``: what several begin with (a group's
    prompt) stands once. auto takes the one that costs least (torch_trainer/planning.py); a model with attention of its own kind is padded.
    It changes speed and memory, never the gradient."""
    skip_zero_advantages: bool = True
    """Leave samples whose advantages are all 0 out of forward and backward where every loss is proportional to the advantage: the gradient
    is the same. Their tokens stay in the denominators. Metrics are then means over the others; ``skipped`` is their share of the tokens."""

    @property
    def target(self) -> str:  # ty: ignore[incompatible-property-override]
        """See ``PluginConfig``."""
        return "miles_train.torch_trainer." + ("trainer:TorchTrainer" if self.ranks == 1 else "spread:SpreadTorchTrainer")

    def bitwise_problems(self) -> list[str]:
        """See ``ModelPart``."""
        problems = [] if self.dtype in (None, "float32") else [f"computes in {self.dtype}; numerics: bitwise needs dtype: float32"]
        if self.layout in ("packed", "shared"):
            problems.append(
                f"has layout: {self.layout}, in which sums are cut otherwise than in the engine; numerics: bitwise needs padded"
            )
        if self.ranks > 1:
            problems.append(f"adds gradients up over {self.ranks} ranks; numerics: bitwise needs ranks: 1")
        return problems


class Parallel(BaseModel):
    """Over how many ranks a model is spread, by kind of parallelism; the product of tensor, pipeline, context and data is the
    number of ranks, and expert divides what is left of it by tensor and pipeline (data × context, and tensor where experts are whole)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensor: int = Field(1, ge=1)
    """Ranks that share each matrix and the vocabulary; more than 1 shares the norms' activations too (sequence parallelism)."""
    pipeline: int = Field(1, ge=1)
    """Ranks one after another, each with a part of the layers."""
    context: int = Field(1, ge=1)
    """Ranks that share each sample's rows."""
    expert: int = Field(1, ge=1)
    """Ranks that share the experts of each MoE layer."""
    data: int = Field(1, ge=1)
    """Ranks that share the samples."""


class MegatronTrainerConfig(AdamWTrainerConfig):
    """megatron-core's GPT model, data parallelism and optimizer, spread over the ranks of the run's cluster."""

    point: ClassVar[str] = "trainer"
    target: ClassVar[str] = "miles_train.megatron.trainer:MegatronTrainer"
    gives: ClassVar[frozenset[str]] = frozenset({"old_logprobs", "ref_logprobs", "teacher_logprobs"})
    knows_old_logprobs: ClassVar[bool] = True

    parallel: Parallel = Parallel()
    """Over how many ranks the model is spread, and how."""
    bucket_bytes: int = Field(256 * 2**20, ge=1)
    """Weights are given away in buckets of about so many bytes."""

    def missing(self) -> list[str]:
        """megatron-core, of the version that is known."""
        try:
            found = metadata.version("megatron-core")
        except metadata.PackageNotFoundError:
            return ["megatron-core is not installed; pip install 'miles-train[megatron]'"]
        return [] if found == MEGATRON else [f"megatron-core is {found}, Miles knows {MEGATRON}; pip install megatron-core=={MEGATRON}"]

    def problems(self, stage: Any) -> list[str]:
        """A role that it cannot train, a layout that does not divide what is known of the model, an architecture that is not known."""
        from .megatron import fitting
        from .ranks.layout import Layout

        layout, found = Layout(**self.parallel.model_dump()), list[str]()
        for model in (m for m in stage.models.values() if m.trainer is self):
            if model.role in ("critic", "reward"):
                found.append(f"it has no scalar head yet, which a {model.role} needs; use trainer: torch")
            config = Path(model.path or "") / "config.json"
            try:
                if model.path is not None and config.is_file():
                    found += fitting.problems(layout, json.loads(config.read_text()))
                elif model.config is not None:
                    found += fitting.early_problems(layout, model.config)
            except (ConfigError, ValueError) as error:
                found.append(str(error))
        return found


class RewardModelConfig(RewardConfig):
    """A reward model's score of prompt and answer. Groups are scored one after another; the wait counts against ``timeout_s``."""

    point: ClassVar[str] = "reward"
    target: ClassVar[str] = "miles_train.reward_model:RewardModel"
    unit: ClassVar[str] = "group"

    path: str | None = None
    """Hugging Face directory or hub id of a model for sequence classification with one label, and its tokenizer."""
    model: str | None = None
    """Or: name of a model with ``role: reward`` that a stage before trained."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Most rows of a forward pass, padding included."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.path is None) == (self.model is None):
            raise ValueError("give either path (a directory with a reward model) or model (the name of one that a stage before trained)")
        return self
