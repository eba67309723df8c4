"""Trainers that a recipe may name, and their options. No torch here: `miles check` reads this module."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from miles_core.plugins import PluginConfig, TrainerConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class TorchTrainerConfig(TrainerConfig):
    """A Hugging Face causal language model and AdamW, in one process."""

    point: ClassVar[str] = "trainer"
    target: ClassVar[str] = "miles_train.torch_trainer.trainer:TorchTrainer"
    gives: ClassVar[frozenset[str]] = frozenset({"old_logprobs", "ref_logprobs", "teacher_logprobs"})

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
    layout: Literal["padded", "packed"] = "padded"
    """A micro-batch is [samples, longest] with padding, or one row [1, N] without. Where there is no flash attention a packed row
    costs the square of its length: set micro_batch_tokens to some 500 on a CPU, or pad."""
    micro_batch_tokens: int = Field(8192, ge=1)
    """Most rows of a forward pass, padding included. It changes memory and speed, never the gradient."""
