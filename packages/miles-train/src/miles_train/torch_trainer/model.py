"""A Hugging Face model over packed rows: what language models and models with a scalar head have in common."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import is_flash_attn_2_available

from miles_core.batch import Batch
from miles_core.errors import ConfigError

from .layouts import LAYOUTS
from .routing_replay import RoutingReplay


class PackedModel(ABC):
    """The model, and the one way it is asked for numbers.

    Attributes:
        hf: The transformers model, in evaluation mode: dropout would make its numbers random.
        device: Where it is.
        vocab_size: Token ids are below it.
        replay: Puts the experts of the batch's column ``routing`` into every forward pass; None: routers choose for themselves.
    """

    gives: ClassVar[frozenset[str]]
    """Batch columns that it can annotate; all of them hold ``annotated``."""
    annotated: ClassVar[str]
    """The output by that name (``outputs``)."""
    reads: ClassVar[tuple[str, ...]]
    """Batch columns that it reads."""
    unsupported: ClassVar[tuple[str, ...]]
    """Sample columns without which the numbers would be wrong; they are not used yet."""

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device, layout: Literal["padded", "packed"]) -> None:
        flash = layout == "packed" and device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
        self.hf = self.load(path, dtype, device, "flash_attention_2" if flash else None)
        self.device = device
        embedding = self.hf.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.vocab_size = embedding.shape[0]
        self._layout = LAYOUTS[layout]
        self.replay: RoutingReplay | None = None
        if layout == "packed":
            _check_packing(self.hf, self.vocab_size)

    @staticmethod
    @abstractmethod
    def load(path: Path, dtype: torch.dtype, device: torch.device, attention: str | None = None) -> PreTrainedModel:
        """The model in ``path`` with all its weights.

        ``attention`` None leaves the implementation to transformers: sdpa, or eager where a model has no other.
        Raises ConfigError if there is no model or weights are missing (transformers would make them up).
        """

    @abstractmethod
    def outputs(self, batch: Batch, rows: np.ndarray) -> dict[str, Tensor]:
        """What losses get (``LossInputs.outputs``): differentiable tensors [N] by name, float32 (float64 for a float64 model).

        Args:
            batch: With the columns ``reads``.
            rows: int64 [R], rows of which log-probabilities are wanted; they predict a token. Those of others are 0.
        """

    @abstractmethod
    def rows_to_annotate(self, batch: Batch) -> np.ndarray:
        """int64: the rows of which ``annotated`` says something."""

    def hidden(self, batch: Batch, rows: np.ndarray) -> Tensor:
        """[R, hidden size]: last hidden states of some rows; row p has read the tokens up to and including p."""
        inputs, where = self._layout(batch)
        with self.replay.forward(batch, where, inputs["input_ids"].size) if self.replay else nullcontext():
            hidden = self.hf.base_model(**{n: self.tensor(x) for n, x in inputs.items()}, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, self.tensor(where[rows]))

    def tensor(self, array: np.ndarray) -> Tensor:
        """An array on the model's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight as ``export`` writes it: the checkpoint's own names, tied weights once.

        The names differ from the modules' where transformers fuses weights on loading: experts of an MoE layer come one by
        one, as copies or views of the fused tensors.
        """
        weights, seen = {}, set()
        for name, weight in self.hf.state_dict(keep_vars=True).items():
            if id(weight) not in seen:
                seen.add(id(weight))
                weights[name] = weight.detach()
        yield from revert_weight_conversion(self.hf, weights).items()


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; None: float32 on a CPU, bfloat16 on a GPU."""
    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))


def check_directory(path: Path) -> None:
    """Raise a ConfigError unless it is a Hugging Face directory."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json; a model's path is a Hugging Face directory")


def read(
    auto_class: Any, path: Path, dtype: torch.dtype, device: torch.device, attention: str | None, **fields: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The model that a transformers Auto class reads, and the names of weights that are not in the checkpoint.

    transformers' own report of them is not printed: who calls refuses them, or knows why they are missing. Nor is what it says of
    tensor parallelism, which it is not asked for.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        model, info = auto_class.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, local_files_only=True, output_loading_info=True, **fields
        )
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return model.to(device).eval(), set(info["missing_keys"])


def refuse_missing(model: PreTrainedModel, path: Path, missing: set[str]) -> None:
    """Raise a ConfigError if a weight was not in the checkpoint."""
    if missing:
        raise ConfigError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, the first is {min(missing)!r}; export it again")


@torch.no_grad()
def _check_packing(model: PreTrainedModel, vocab_size: int) -> None:
    """The same tokens twice in one row must give the same hidden states twice, or samples see each other."""
    tokens = torch.arange(8, device=model.device)[None] % 4 % vocab_size
    positions = torch.arange(8, device=model.device)[None] % 4
    hidden = model.base_model(tokens, position_ids=positions, use_cache=False).last_hidden_state
    if not close(hidden[:, :4], hidden[:, 4:]):
        raise ConfigError(
            f"{type(model).__name__} lets packed samples see each other (a recurrent state, or its own masks); use layout: padded"
        )


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: both come from the same operations on the same numbers."""
    tolerance = 5e-3 if a.dtype == torch.bfloat16 else 1e-4
    return torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
