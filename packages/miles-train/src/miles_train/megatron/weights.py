"""Weights in from a Hugging Face directory and out under Hugging Face names, both by the rows of the model's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miles_core.errors import ConfigError
from miles_core.model_files import refuse_not_finite

from .checkpoint_files import CheckpointFiles
from .cuts import Piece, Shape, local_shape, pieces
from .model import PolicyModel
from .specs import Parameter


@dataclass(frozen=True)
class Entry:
    """A weight as the Hugging Face checkpoint holds it: name and whole shape."""

    name: str
    shape: tuple[int, ...]


@torch.no_grad()
def load(model: PolicyModel, path: Path) -> None:
    """Fill the parameters of this rank from a directory's safetensors; reads only the slices that this rank holds. Not collective.

    Raises:
        ConfigError: A weight is missing, of another shape, not finite, not known to the table, or there are no safetensors.
    """
    where, here = _Placement(model), model.coordinates
    parameters = list(model.spec.parameters(model.hf_config))
    unfilled = dict(model.named_parameters())
    with CheckpointFiles(path) as files:
        files.check({n: shape for p in parameters for n, shape in p.tensors}, {n for p in parameters if p.copy for n in p.weight.hf})
        for parameter in parameters:
            if not where.holds(here.pipeline, here.expert, parameter):
                continue
            target = unfilled.pop(where.local_name(parameter), None)
            if target is None:
                if parameter.copy:  # tied, and the embedding is on this stage too
                    continue
                raise ConfigError(f"the table of {model.spec.architecture} names {where.local_name(parameter)!r}, which the model lacks")
            target.zero_()  # what no piece covers is padding of the vocabulary
            for piece, rows in where.pieces(parameter, here.tensor):
                name, _ = parameter.tensors[piece.tensor]
                held = files.read(name, piece.axis, piece.start, piece.stop)
                refuse_not_finite([(name, held)], path)
                target[rows].copy_(held)
    if unfilled:
        raise ConfigError(f"the table of {model.spec.architecture} has no row for {next(iter(unfilled))!r}, which the model has; add it")


def manifest(model: PolicyModel) -> list[Entry]:
    """Every weight in the order of ``export``; tied weights once. The same on every rank."""
    return [Entry(name, shape) for parameter in _exported(model) for name, shape in parameter.tensors]


@torch.no_grad()
def export(
    model: PolicyModel, max_bytes: int = 256 * 2**20, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach()
) -> Iterator[list[tuple[str, Tensor]]]:
    """Whole tensors under Hugging Face names, bucket by bucket, on rank 0; the other ranks get as many empty lists.

    Collective: every rank goes through the iterator to its end, in step. A bucket is at most ``max_bytes``, or a single group of
    tensors that is larger by itself (q, k and v; gate and up). The tensors are copies that the receiver may keep.

    Args:
        model: This rank's stage, the bare PolicyModel.
        max_bytes: Most bytes of a bucket.
        of: What to take of each parameter, all of one dtype and of the parameter's shape; e.g. ``lambda p: p.main_grad`` for the
            gradients (complete ones: after finalize_model_grads).
    """
    where, mine, rank = _Placement(model), dict(model.named_parameters()), dist.get_rank()
    like = of(next(iter(mine.values())))

    def part(parameter: Parameter) -> Tensor:
        return of(mine[where.local_name(parameter)])

    for bucket in _buckets(_exported(model), max_bytes // like.element_size()):
        messages: dict[int, list[tuple[Parameter, int]]] = {}
        for parameter in bucket:
            for source, tensor in where.sources(parameter):
                messages.setdefault(source, []).append((parameter, tensor))
        if rank != 0:
            if rank in messages:
                dist.send(torch.cat([part(parameter).flatten() for parameter, _ in messages[rank]]), 0)
            yield []
            continue
        received = {s: like.new_empty(sum(prod(where.local_shape(p)) for p, _ in m)) for s, m in messages.items() if s != 0}
        arriving = {source: dist.irecv(buffer, source) for source, buffer in received.items()}
        whole = {name: like.new_empty(shape) for parameter in bucket for name, shape in parameter.tensors}
        for source, message in messages.items():
            if arrival := arriving.get(source):
                arrival.wait()
            offset = 0
            for parameter, tensor in message:
                if source == 0:
                    local = part(parameter)
                else:
                    shape = where.local_shape(parameter)
                    local, offset = received[source][offset : offset + prod(shape)].view(shape), offset + prod(shape)
                for piece, rows in where.pieces(parameter, tensor):
                    target = whole[parameter.tensors[piece.tensor][0]]
                    target.narrow(piece.axis, piece.start, piece.stop - piece.start).copy_(local[rows])
        yield list(whole.items())


def _exported(model: PolicyModel) -> list[Parameter]:
    return [parameter for parameter in model.spec.parameters(model.hf_config) if not parameter.copy]


def _buckets(parameters: Sequence[Parameter], max_elements: int) -> Iterator[list[Parameter]]:
    """In order, as many as fit at a time, at least one."""
    bucket: list[Parameter] = []
    held = 0
    for parameter in parameters:
        size = sum(prod(shape) for _, shape in parameter.tensors)
        if bucket and held + size > max_elements:
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += size
    if bucket:
        yield bucket


class _Placement:
    """Which ranks hold a parameter, under which name, and which part of it."""

    def __init__(self, model: PolicyModel) -> None:
        self._layout = model.layout
        self._groups = model.spec.kv_heads(model.hf_config)
        self._layers = model.config.num_layers // model.layout.pipeline
        self._experts = (model.config.num_moe_experts or 0) // model.layout.expert

    def stage(self, parameter: Parameter) -> int:
        """Pipeline stage."""
        return {"first": 0, "last": self._layout.pipeline - 1, "layer": parameter.layer // self._layers}[parameter.place]

    def holds(self, pipeline: int, expert: int, parameter: Parameter) -> bool:
        """Whether a rank at these coordinates has a part of it."""
        return self.stage(parameter) == pipeline and (parameter.expert is None or parameter.expert // self._experts == expert)

    def local_name(self, parameter: Parameter) -> str:
        """Its name on the ranks that hold it, where layers and experts are counted anew."""
        expert = None if parameter.expert is None else parameter.expert % self._experts
        return parameter.weight.megatron.format(layer=parameter.layer % self._layers, expert=expert)

    def sources(self, parameter: Parameter) -> list[tuple[int, int]]:
        """(global rank, tensor-parallel part) that make it up: one copy of each part."""
        stage = self.stage(parameter)
        if parameter.expert is not None:
            return [(self._layout.expert_rank(stage, parameter.expert // self._experts), 0)]
        parts = 1 if parameter.weight.cut == "replicated" else self._layout.tensor
        return [(self._layout.dense_rank(stage, tensor), tensor) for tensor in range(parts)]

    def local_shape(self, parameter: Parameter) -> Shape:
        """Shape of a part."""
        return local_shape(parameter.weight.cut, [shape for _, shape in parameter.tensors], self._size(parameter))

    def pieces(self, parameter: Parameter, tensor: int) -> Iterator[tuple[Piece, slice]]:
        """The pieces of a part and the rows of it where they are."""
        shapes, size = [shape for _, shape in parameter.tensors], self._size(parameter)
        row = 0
        for piece in pieces(parameter.weight.cut, shapes, tensor if size > 1 else 0, size, self._groups):
            rows = piece.stop - piece.start if piece.axis == 0 else shapes[piece.tensor][0]
            yield piece, slice(row, row + rows)
            row += rows

    def _size(self, parameter: Parameter) -> int:
        return 1 if parameter.expert is not None else self._layout.tensor
