"""What a model is like, from the directory it was started from: what a server's answers and new weights are checked against."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miles_core.errors import ConfigError, DataError
from miles_core.model_files import declared_ends, sentences, weight_shapes

if TYPE_CHECKING:
    from torch import Tensor

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
IDLE_FIELDS = re.compile(
    "^_|_token_id$|dropout$|^output_|label|^(transformers_version|architectures|dtype|torch_dtype|use_cache|return_dict|problem_type"
    "|initializer_range|router_aux_loss_coef|chunk_size_feed_forward|is_encoder_decoder)$"
)
"""Fields of a config that change nothing in what a server computes."""
EXPERTS_A_TOKEN = ("num_experts_per_tok", "moe_topk", "num_experts_per_token")


@dataclass(frozen=True)
class ModelShape:
    """What can be known of a model without loading it.

    Attributes:
        vocab_size: Token ids are below it.
        layers: All of them; servers give a routing row for each.
        moe_layers: Those with experts, in model order; empty for dense models.
        experts: Routed experts a layer, 0 for dense models.
        top_k: How many a token goes to, 0 for dense models.
        tied: Whether the output projection is the embedding.
        end_of_text: Ids that the model's files say end a text; servers stop at each of them.
        weights: Shape of each weight in the directory's safetensors files by name.
        architectures: As the config names them; empty where it names none.
        fields: Of the config, those that decide what the model computes.
        positions: Longest sequence; None where the position encoding is scaled.
    """

    vocab_size: int
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    tied: bool
    end_of_text: frozenset[int]
    weights: dict[str, tuple[int, ...]]
    architectures: tuple[str, ...]
    fields: dict[str, Any]
    positions: int | None

    @property
    def routing_dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Of the routing column."""
        return np.uint8 if self.experts <= 255 else np.uint16

    @staticmethod
    def read(directory: Path) -> ModelShape:
        """Of a Hugging Face directory.

        Raises:
            ConfigError: It has no config, transformers does not know such a model, or the config does not say how many experts a token goes
                to.
        """
        from transformers import AutoConfig  # heavy; not needed before an engine starts

        if not (directory / "config.json").is_file():
            raise ConfigError(f"{directory} has no config.json; a model's path is a Hugging Face directory")
        with sentences(directory):
            whole = AutoConfig.from_pretrained(directory, local_files_only=True)
        config = whole.get_text_config()
        experts = max(getattr(config, name, None) or 0 for name in EXPERT_COUNTS)
        top_k = max(getattr(config, name, None) or 0 for name in EXPERTS_A_TOKEN) if experts else 0
        if experts and not top_k:
            raise ConfigError(f"{directory}/config.json names {experts} experts, but not how many a token goes to ({EXPERTS_A_TOKEN[0]})")
        return ModelShape(
            vocab_size=config.vocab_size,
            layers=config.num_hidden_layers,
            moe_layers=_moe_layers(config) if experts else (),
            experts=experts,
            top_k=top_k,
            tied=bool(config.tie_word_embeddings),
            end_of_text=declared_ends(directory),
            weights=weight_shapes(directory),
            architectures=tuple(whole.architectures or ()),
            fields={name: value for name, value in config.to_dict().items() if not IDLE_FIELDS.search(name)},
            positions=_positions(config),
        )

    def checked(self, weights: Iterable[tuple[str, Tensor]], dtype: str) -> Iterator[tuple[str, Tensor]]:
        """The weights as they come, each compared with the directory's; the server itself would drop unknown ones and die of wrong shapes.

        Raises:
            DataError: A name is unknown, comes twice or is missing, or a shape or dtype does not fit.
        """
        seen: set[str] = set()
        for name, tensor in weights:
            if name not in self.weights and not (self.tied and name == "lm_head.weight"):
                raise DataError(f"weight {name!r} is unknown to the model the servers were started from; its {self._some()}")
            if name in seen:
                raise DataError(f"weight {name!r} comes twice (tied weights are one)")
            held = self.weights.get(name, tuple(tensor.shape))
            given = str(tensor.dtype).removeprefix("torch.")
            if tuple(tensor.shape) != held or given != dtype:
                raise DataError(
                    f"weight {name!r} is {given} {list(tensor.shape)}, the servers hold {dtype} {list(held)}; "
                    "give trainer and engine the same model and dtype"
                )
            seen.add(name)
            yield name, tensor
        missing = [name for name in self.weights if name not in seen and not (self.tied and name == "lm_head.weight")]
        if missing:
            raise DataError(f"{len(missing)} weights are missing, the first is {missing[0]!r}; an update brings all of them")

    def check_same(self, found: ModelShape, directory: Path) -> None:
        """Raise a DataError unless a directory holds the same weights by name and shape."""
        for name in sorted(self.weights.keys() | found.weights.keys()):
            held, given = self.weights.get(name), found.weights.get(name)
            if held != given and not (self.tied and name == "lm_head.weight"):
                raise DataError(
                    f"weight {name!r} in {directory} is {_said(given)}, in the model the servers were started from {_said(held)}; "
                    "export the model that is trained"
                )

    def _some(self) -> str:
        return f"{len(self.weights)} weights have names such as {next(iter(self.weights), 'none')!r}"


def _positions(config: Any) -> int | None:
    """As many as its position encoding has by itself."""
    rope = getattr(config, "rope_parameters", None) or {}
    return getattr(config, "max_position_embeddings", None) if rope.get("rope_type") == "default" else None


def _moe_layers(config: Any) -> tuple[int, ...]:
    """The declarations in use: a list of dense layers, a step, or a number of dense layers at the start."""
    dense, step = set(getattr(config, "mlp_only_layers", None) or ()), getattr(config, "decoder_sparse_step", None) or 1
    first, every = getattr(config, "first_k_dense_replace", None) or 0, getattr(config, "moe_layer_freq", None) or 1
    every_list = every if isinstance(every, list) else [layer % every == 0 for layer in range(config.num_hidden_layers)]
    return tuple(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in dense and (layer + 1) % step == 0 and layer >= first and every_list[layer]
    )


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
