"""How many ranks a model is spread over, and which part of it a rank holds."""

from __future__ import annotations

from dataclasses import dataclass


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
