"""How many ranks a model is spread over, and which part of it a rank holds. No torch here: `miles check` reads this module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .specs import model_spec


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands along each axis of a Layout: each from 0 to that axis' size.

    ``expert_data`` counts the copies of the same experts; those of 0 are exported.
    """

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    expert_data: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes. The order of ranks is megatron-core's own: tensor fastest, then context, data, pipeline.

    Experts are spread over the ``tensor × context × data`` ranks of a pipeline stage: ``expert`` divides that number and does not
    multiply the world size. An expert's own matrices are never cut.

    Attributes:
        tensor: Ranks that share each matrix; more than 1 cuts the rows between the matrices too (sequence parallelism).
        pipeline: Stages of layers.
        context: Ranks that share the rows of a micro-batch.
        expert: Ranks that share the experts of a layer.
        data: Copies of the model that get different micro-batches.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1

    @property
    def sequence_parallel(self) -> bool:
        """Whether tensor-parallel ranks share the rows between the matrices."""
        return self.tensor > 1

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.stage_size * self.pipeline

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` stands."""
        pipeline, within = divmod(rank, self.stage_size)
        rest, tensor = divmod(within, self.tensor)
        data, context = divmod(rest, self.context)
        expert_data, expert = divmod(within, self.expert)
        return Coordinates(tensor, context, data, pipeline, expert, expert_data)

    def dense_rank(self, pipeline: int, tensor: int) -> int:
        """The rank that exports a part of the matrices of a stage: context and data are 0."""
        return pipeline * self.stage_size + tensor

    def expert_rank(self, pipeline: int, expert: int) -> int:
        """The rank that exports a part of the experts of a stage: expert_data is 0."""
        return pipeline * self.stage_size + expert

    def indivisible(self, fields: Mapping[str, Any]) -> list[str]:
        """What the fields that a recipe gives of a new model's config say already; what they leave out is looked at when it is built."""
        shared = [
            ("tensor", "attention heads", "num_attention_heads"),
            ("tensor", "key/value heads", "num_key_value_heads"),
            ("tensor", "columns in an MLP", "intermediate_size"),
            ("pipeline", "layers", "num_hidden_layers"),
            ("expert", "experts", "num_experts"),
        ]
        found = [_cannot_share(getattr(self, axis), axis, fields[name], what) for axis, what, name in shared if name in fields]
        if self.stage_size % self.expert:
            found.append(self._experts_nowhere())
        return [sentence for sentence in found if sentence]

    def _experts_nowhere(self) -> str:
        return (
            f"{self.expert} expert-parallel ranks do not divide the tensor × context × data = {self.stage_size} ranks of a pipeline "
            "stage, over which experts are spread; choose an expert-parallel size that does"
        )

    def problems(self, hf_config: Mapping[str, Any]) -> list[str]:
        """What in these sizes, or in a model (its config.json) under them, does not fit, a sentence each; empty if all is well.

        Raises:
            ConfigError: The model's architecture or a field of its config is not supported (``specs.model_spec``).
        """
        if small := [name for name, size in vars(self).items() if size < 1]:
            return [f"the {name}-parallel size is {getattr(self, name)}; the least is 1, which does not cut" for name in small]
        spec = model_spec(hf_config)
        model = spec.transformer(hf_config) | spec.model(hf_config)
        divided = [
            ("tensor", "attention heads", model["num_attention_heads"]),
            ("tensor", "key/value heads", model["num_query_groups"]),
            ("tensor", "columns in an MLP", model["ffn_hidden_size"]),
            ("pipeline", "layers", model["num_layers"]),
        ]
        experts = model.get("num_moe_experts")
        if experts:
            divided.append(("expert", "experts", experts))
        found = [s for axis, what, count in divided if (s := _cannot_share(getattr(self, axis), axis, count, what))]
        if self.expert > 1 and not experts:
            found.append(f"{self.expert} expert-parallel ranks, but {spec.architecture} has no experts; leave expert at 1")
        elif self.stage_size % self.expert:
            found.append(self._experts_nowhere())
        vocab = model["vocab_size"]
        if -(-vocab // self.tensor) * (self.tensor - 1) >= vocab:
            found.append(f"a vocabulary of {vocab} leaves some of {self.tensor} tensor-parallel ranks without a token; choose fewer")
        return found


def _cannot_share(size: int, axis: str, count: int, what: str) -> str | None:
    if count % size == 0:
        return None
    return f"{size} {axis}-parallel ranks cannot share {count} {what} evenly; choose a {axis}-parallel size that divides {count}"
