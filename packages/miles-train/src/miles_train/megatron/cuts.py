"""How a weight is cut over tensor-parallel ranks: one function says which pieces of the whole tensors a rank's part is made of.

Reading and writing both follow it, so that what is read and written again is the same to the bit. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

Cut = Literal["replicated", "column", "row", "vocab", "fused_qkv", "gate_up"]
"""A parameter, from whole tensors, on ``size`` ranks:

- replicated: the whole tensor on each. An expert's matrices are never cut either, but for gate_up they are put together.
- column: equal parts along axis 0.
- row: equal parts along axis 1.
- vocab: parts of ⌈V / size⌉ rows; the last ones are filled up with zeros.
- fused_qkv: of q, k and v: each rank has some of the key/value heads, and for each of them [its query heads, k, v].
- gate_up: of gate and up: a part of gate above the same part of up.
"""

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """``start`` to ``stop`` along ``axis`` of one whole tensor. The pieces of a rank follow one another along its axis 0."""

    tensor: int
    axis: int
    start: int
    stop: int


def pieces(cut: Cut, shapes: Sequence[Shape], rank: int, size: int, groups: int) -> list[Piece]:
    """What rank ``rank`` of ``size`` holds of whole tensors of these shapes, in its order.

    Args:
        cut: How they are cut.
        shapes: Of the whole tensors, in the order of the table.
        rank: Tensor-parallel rank.
        size: Tensor-parallel size; it divides what is cut (``Layout.problems``), but for the vocabulary.
        groups: Key/value heads of the model.
    """
    first = shapes[0]
    if cut == "replicated":
        return [Piece(0, 0, 0, first[0])]
    if cut == "vocab":
        rows = -(-first[0] // size)
        return [Piece(0, 0, min(rank * rows, first[0]), min((rank + 1) * rows, first[0]))]
    if cut == "row":
        return [_part(0, 1, first[1], rank, size)]
    if cut in ("column", "gate_up"):
        return [_part(i, 0, shape[0], rank, size) for i, shape in enumerate(shapes)]
    mine = range(groups // size * rank, groups // size * (rank + 1))
    return [_part(i, 0, shape[0], group, groups) for group in mine for i, shape in enumerate(shapes)]


def local_shape(cut: Cut, shapes: Sequence[Shape], size: int) -> Shape:
    """Shape of a rank's parameter."""
    first = shapes[0]
    if cut == "row":
        return (first[0], first[1] // size)
    if cut == "vocab":
        return (-(-first[0] // size), *first[1:])
    rows = sum(shape[0] for shape in shapes)
    return (rows if cut == "replicated" else rows // size, *first[1:])


def _part(tensor: int, axis: int, length: int, rank: int, size: int) -> Piece:
    part = length // size
    return Piece(tensor, axis, rank * part, (rank + 1) * part)
