"""A Hugging Face model over packed rows: what language models and models with a scalar head have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from miles_core.adapters import Adapter
from miles_core.batch import Batch
from miles_core.errors import ConfigError
from miles_core.lora import Lora
from miles_core.model_files import read_model, refuse_not_finite
from miles_core.moe import find_routers
from miles_kernels.invariant import model as invariant

from . import attention, layouts, planning
from .layouts import MicroBatch
from .routing_replay import RoutingReplay

Choice = Literal["auto", "padded", "packed", "shared"]


class PackedModel(ABC):
    """The model, and the one way it is asked for numbers.

    Attributes:
        hf: The transformers model, in evaluation mode: dropout would make its numbers random.
        path: Where it was read.
        adapter: What is trained of it and published, where that is an adapter; the weights in ``path`` are frozen then.
        device: Where it is.
        vocab_size: Token ids are below it.
        layouts: Those that micro-batches may have; the cheapest is taken.
        costs: What its rows cost, where there is more than one layout.
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

    def __init__(
        self, path: Path, dtype: torch.dtype, device: torch.device, layout: Choice, bitwise: bool = False, lora: Lora | None = None
    ) -> None:
        self.hf = self.load(path, dtype, device)
        self.path = path
        self.device = device
        self.adapter = None if lora is None else Adapter(self.hf, lora, path)
        with self.adapter.noisy() if self.adapter else nullcontext():
            self._prepare(layout, bitwise)

    def _prepare(self, layout: Choice, bitwise: bool) -> None:
        """Find the layouts that the model can have, and make it bitwise if that is asked for."""
        embedding = self.hf.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.vocab_size = embedding.shape[0]
        self.replay: RoutingReplay | None = None
        self.layouts: tuple[layouts.Name, ...] = ("padded",)
        if bitwise:
            _make_bitwise(self.hf, self.vocab_size)
        elif layout != "padded" and (why := _stand_in(self.hf, self.vocab_size)) is None:
            self.layouts = ("padded", "packed", "shared") if layout == "auto" else (layout,)
        elif layout in ("packed", "shared"):
            raise ConfigError(f"{type(self.hf).__name__} {why}; use layout: auto or padded")
        self.costs = planning.NOTHING
        if len(self.layouts) > 1:  # models without attention heads have no such costs, and one layout
            config = self.hf.config.get_text_config()
            self.costs = planning.Costs.of(config, _parameters_a_row(self.hf.base_model, config) - embedding.numel())

    @staticmethod
    @abstractmethod
    def load(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model in ``path`` with all its weights.

        Raises ConfigError if there is no model or weights are missing (transformers would make them up).
        """

    @abstractmethod
    def outputs(self, micro: MicroBatch, rows: np.ndarray) -> dict[str, Tensor]:
        """What losses get (``LossInputs.outputs``): differentiable tensors [N] by name, float32 (float64 for a float64 model).

        Args:
            micro: With the columns ``reads``.
            rows: int64 [R], rows of which log-probabilities are wanted; they predict a token. Those of others are 0.
        """

    @abstractmethod
    def rows_to_annotate(self, batch: Batch) -> np.ndarray:
        """int64: the rows of which ``annotated`` says something."""

    def hidden(self, micro: MicroBatch, rows: np.ndarray) -> Tensor:
        """[R, hidden size]: last hidden states of some rows; row p has read the tokens up to and including p."""
        given = micro.layout
        options: dict[str, Any] = {} if given.positions is None else {"position_ids": self.tensor(given.positions)}
        if given.places is not None:
            options["blocks"] = attention.Blocks(tuple(map(self.tensor, given.blocks)), self.tensor(given.places))
        with self.replay.forward(micro.batch, given.where, given.tokens.size) if self.replay else nullcontext():
            hidden = self.hf.base_model(self.tensor(given.tokens), use_cache=False, **options).last_hidden_state
        return F.embedding(self.tensor(given.where[rows]), hidden.flatten(0, 1))

    def micro_batches(self, batch: Batch, units: np.ndarray, max_tokens: int) -> list[MicroBatch]:
        """The batch in micro-batches of at most ``max_tokens`` rows, padding included (a longer unit stands alone).

        Args:
            batch: With the columns ``reads``.
            units: int64 [S], samples with the same number stay together.
            max_tokens: Most rows of a forward pass.
        """
        parts, layout = planning.plan(batch, units, max_tokens, self.layouts, self.costs)
        return [MicroBatch.of(batch, samples, layout) for samples in parts]

    def recompute(self) -> None:
        """From now on keep no activations inside of layers: the backward pass computes them again. Gradients do not change.

        Raises ConfigError if the model does not say what its layers are.
        """
        layers = [module for module in self.hf.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(f"{type(self.hf).__name__} has no layers that transformers can compute again; set recompute: false")
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def tensor(self, array: np.ndarray) -> Tensor:
        """An array on the model's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def masters(self) -> dict[str, nn.Parameter]:
        """What is trained, float32 by parameter name. In float32 the parameters themselves; else copies that are read again: a file may
        hold more digits than the forward pass uses."""
        if self.hf.dtype == torch.float32:
            return {name: p for name, p in self.hf.named_parameters() if p.requires_grad}
        if self.adapter is not None:
            return self.adapter.masters()
        return dict(self.load(self.path, torch.float32, self.device).named_parameters())

    def share_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Use these tensors, by name in the checkpoint, as the memory of the weights. Those that the checkpoint names otherwise than the
        modules (fused experts) stay where they are."""
        of_modules = self.adapter.own_names() if self.adapter else {}
        places = {of_modules.get(name, name): place for name, place in memory.items()}
        for name, parameter in self.hf.named_parameters():
            place = places.get(name)
            if place is not None and (place.shape, place.dtype, place.device) == (parameter.shape, parameter.dtype, parameter.device):
                parameter.data = place

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight as ``export`` writes it: the checkpoint's own names, tied weights once; of an adapter those of
        its file, and no others.

        The names differ from the modules' where transformers fuses weights on loading: experts of an MoE layer come one by
        one, as copies or views of the fused tensors.
        """
        if self.adapter is not None:
            yield from self.adapter.named()
            return
        weights, seen = {}, set()
        for name, weight in self.hf.state_dict(keep_vars=True).items():
            if id(weight) not in seen:
                seen.add(id(weight))
                weights[name] = weight.detach()
        yield from revert_weight_conversion(self.hf, weights).items()


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; None: float32 on a CPU, bfloat16 on a GPU."""
    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))


def read(auto_class: Any, path: Path, dtype: torch.dtype, device: torch.device, **fields: Any) -> tuple[PreTrainedModel, set[str]]:
    """The model that a transformers Auto class reads, and the names of weights that are not in the checkpoint.

    Raises ConfigError as ``read_model`` does, and if a weight is not finite.
    """
    model, missing = read_model(auto_class, path, dtype=dtype, **fields)
    model = model.to(device).eval()
    refuse_not_finite(((name, weight) for name, weight in model.named_parameters() if name not in missing), path)
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa drops the cap without a word
    return model, missing


def _parameters_a_row(base: nn.Module, config: Any) -> int:
    """Parameters that a row goes through, embeddings included: of a layer's experts, those that a token takes."""
    every = sum(p.numel() for p in base.parameters())
    experts = sum(p.numel() for name, p in base.named_parameters() if ".experts." in name)
    taken = getattr(config, "num_experts_per_tok", None)
    number = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or getattr(config, "n_routed_experts", None)
    return every if not (experts and taken and number) else every - experts + experts * taken // number


@torch.no_grad()
def _stand_in(model: PreTrainedModel, vocab_size: int) -> str | None:
    """Give the model attention over rows that stand once; else say why it cannot have it, and leave it as it was.

    The same hidden states must come back as with the model's own attention, whether samples are padded, or share a row and what they
    begin with. Windows are made narrower than the samples meanwhile: many models put theirs into the mask only.
    """
    if not attention.can_stand_in(model):
        return "has attention of its own kind, which takes no packed samples"
    own = model.config.get_text_config()._attn_implementation
    with attention.windows_of_at_most(4, model):
        expected = model.base_model(_probe(model, vocab_size), use_cache=False).last_hidden_state
        try:
            model.set_attn_implementation(attention.NAME)
            same = _gives(model, vocab_size, expected)
        except Exception as error:  # of the model's own code, which knows nothing of this attention
            model.set_attn_implementation(own)
            return f"fails with packed samples ({type(error).__name__}: {error})"
    if same:
        return None
    model.set_attn_implementation(own)
    return "lets packed samples see each other (a recurrent state, or masks or windows of its own)"


def _probe(model: PreTrainedModel, vocab_size: int) -> Tensor:
    """int64 [2, 9]: token ids of two samples that begin with the same three."""
    tokens = torch.arange(18, device=model.device).view(2, 9) % vocab_size
    tokens[:, :3] = tokens[0, :3]
    return tokens


def _gives(model: PreTrainedModel, vocab_size: int, expected: Tensor) -> bool:
    """Whether the model gives these hidden states [2, 9, hidden size] to the probe, packed and padded."""
    tokens = _probe(model, vocab_size)
    rows = torch.arange(18, device=model.device).view(2, 9)
    rows[1, :3] = rows[0, :3]
    rows[1, 3:] -= 3
    places = torch.cat([torch.arange(9), torch.arange(12, 18)]).to(model.device)
    positions = torch.cat([torch.arange(9), torch.arange(3, 9)]).to(model.device)
    flat = tokens.flatten()[places]
    found = model.base_model(flat[None], position_ids=positions[None], blocks=attention.Blocks((rows,), places), use_cache=False)
    padded = model.base_model(tokens, use_cache=False).last_hidden_state
    return close(found.last_hidden_state[0, rows], expected) and close(padded, expected)


@torch.no_grad()
def _make_bitwise(model: PreTrainedModel, vocab_size: int) -> None:
    """Make its numbers the same in any company; they must be those that it had before.

    Raises:
        ConfigError: They are not, or depend on their company on this machine.
    """
    tokens = torch.arange(40, device=model.device)[None] * 7919 % vocab_size
    own = model.base_model(tokens, use_cache=False).last_hidden_state
    end = f"numerics: bitwise cannot be had with this {type(model).__name__}"
    try:
        invariant.make_invariant(model, find_routers(model))
        hidden = model.base_model(tokens, use_cache=False).last_hidden_state
        why = invariant.first_difference(model, vocab_size)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:  # modules of a form that its hooks do not know
        raise ConfigError(f"{end}: {error}") from error
    if not close(hidden, own):
        raise ConfigError(f"{end}: its numbers change by more than rounding, so its attention is not plain scaled dot products")
    if why:
        raise ConfigError(f"{end} on this machine: {why}")


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding: both come from the same operations on the same numbers."""
    tolerance = 5e-3 if a.dtype == torch.bfloat16 else 1e-4
    return torch.allclose(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
