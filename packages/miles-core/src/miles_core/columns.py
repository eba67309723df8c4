"""The one table of a Sample's columns, and the three kinds of column (DESIGN §2).

A column is declared once, here or by ``register_column`` in a plug-in: its kind, dtype, fill, trailing axes, whether
packing rolls it, and how it splits under context parallelism. Everything else (validate, slice, concatenate, pack, split,
serialise, view) asks this table, so that a new column is one declaration and no other edit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np

from .errors import DataError

Kind = Literal["token", "ragged", "attachment"]


@dataclass(frozen=True)
class ColumnSpec:
    """How one column behaves.

    Attributes:
        name: The column's name.
        kind: ``token`` [T, …], ``ragged`` (any number of values a token) or ``attachment`` (tensors over token spans).
        dtypes: Allowed dtypes, the first is the default. Empty for attachments.
        fill: The value that means "not recorded"; ``None`` stands for the dtype's maximum.
        trailing: Number of axes after the token axis (routing has two: MoE layer, expert).
        rolled: Whether packing rolls it by −1, so that row p speaks of the token predicted AT p. False for what
            belongs to the token as an input (tokens, routing, attachments).
        split: Under context parallelism each rank gets its ``rows``, or the ``whole``.
        doc: One line for people.
    """

    name: str
    kind: Kind
    dtypes: tuple[str, ...]
    fill: float | int | bool | None
    trailing: int = 0
    rolled: bool = True
    split: Literal["rows", "whole"] = "rows"
    doc: str = ""

    def fill_for(self, dtype: np.dtype) -> float | int | bool:
        """The fill in a concrete dtype (routing's sentinel is the maximum of whichever dtype was used)."""
        return int(np.iinfo(dtype).max) if self.fill is None else self.fill


@dataclass(frozen=True)
class Ragged:
    """Any number of values for each token: token t owns ``values[offsets[t]:offsets[t + 1]]``.

    Attributes:
        values: [M, …].
        offsets: int64 [T + 1], from 0 to M, never falling.
    """

    values: np.ndarray
    offsets: np.ndarray

    @staticmethod
    def of(rows: Sequence[Sequence], dtype: str) -> Ragged:
        """From a list of T lists."""
        offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
        flat = [v for row in rows for v in row]
        return Ragged(np.asarray(flat, dtype=dtype), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, t: int) -> np.ndarray:
        """The values of token t."""
        return self.values[self.offsets[t] : self.offsets[t + 1]]

    def take(self, rows: np.ndarray) -> Ragged:
        """The given rows, in that order; −1 gives an empty row."""
        starts, ends = self.offsets[:-1], self.offsets[1:]
        lengths = np.where(rows >= 0, (ends - starts)[rows], 0) if len(self) else np.zeros(len(rows), np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) + np.repeat(starts[rows] if len(self) else lengths, lengths)
        return Ragged(self.values[index], offsets)


@dataclass(frozen=True)
class Blob:
    """Named tensors addressed by what is in them; samples of a group share one object (an image that all of them see)."""

    tensors: dict[str, np.ndarray] = field(compare=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self._hash())

    def _hash(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}|{tensor.dtype.str}|{tensor.shape}|".encode())
            digest.update(np.ascontiguousarray(tensor).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Attachment:
    """A blob laid over tokens ``start`` to ``end`` (exclusive), e.g. an image over its placeholder tokens."""

    start: int
    end: int
    blob: Blob


@dataclass(frozen=True)
class Attachments:
    """An attachment column: items in order of their spans, in a sample of ``length`` tokens."""

    items: tuple[Attachment, ...]
    length: int

    def __len__(self) -> int:
        return self.length


Column = np.ndarray | Ragged | Attachments

COLUMNS: dict[str, ColumnSpec] = {}


def register_column(spec: ColumnSpec) -> ColumnSpec:
    """Add a column to the table. Declaring the same column twice alike is harmless; differently is an error."""
    if repr(COLUMNS.get(spec.name, spec)) != repr(spec):  # by repr: two NaN fills are alike, though NaN ≠ NaN
        raise DataError(f"column {spec.name!r} is declared twice and differently: {COLUMNS[spec.name]} and {spec}. Rename one.")
    COLUMNS[spec.name] = spec
    return spec


def column_spec(name: str) -> ColumnSpec:
    """The declaration of a column; an unknown name is a sentence."""
    if name not in COLUMNS:
        raise DataError(f"unknown column {name!r}. Known: {', '.join(COLUMNS)}. A plug-in declares new ones with register_column.")
    return COLUMNS[name]


def _float(name: str, doc: str) -> ColumnSpec:
    return ColumnSpec(name, "token", ("float32", "float64"), np.nan, doc=doc)


for _spec in (
    ColumnSpec("tokens", "token", ("int32",), 0, rolled=False, doc="prompt, model and environment tokens in order"),
    ColumnSpec("versions", "token", ("int32",), -1, doc="weight version that sampled token t; −1: not sampled"),
    ColumnSpec("loss_mask", "token", ("bool",), False, doc="token t is a training target"),
    _float("logprobs", "behaviour log-probability under the distribution token t was sampled from; NaN: not sampled"),
    ColumnSpec(
        "routing", "token", ("uint8", "uint16"), None, trailing=2, rolled=False, doc="experts [L_moe, K] chosen when token t was the input"
    ),
    ColumnSpec("advantages", "token", ("float32", "float64"), 0.0, doc="advantage of token t"),
    ColumnSpec("high_covariance", "token", ("bool",), False, doc="token t was selected by clip_cov or kl_cov"),
    ColumnSpec("correction_weights", "token", ("float32", "float64"), 1.0, doc="factor of token t's policy-gradient loss"),
    _float("old_logprobs", "log-probability under the weights before the first optimizer step of this batch"),
    _float("ref_logprobs", "log-probability under the reference model"),
    _float("teacher_logprobs", "log-probability under the teacher model"),
    _float("values", "critic's value of the state in which token t was chosen"),
    _float("returns", "target of the critic for token t"),
    ColumnSpec("support", "ragged", ("int32",), -1, doc="token ids that sampling was restricted to at token t"),
    ColumnSpec("teacher_top_ids", "ragged", ("int32",), -1, doc="token ids of the teacher's top-k at token t"),
    ColumnSpec("teacher_top_logprobs", "ragged", ("float32",), np.nan, doc="log-probabilities of the teacher's top-k at token t"),
    ColumnSpec("targets", "token", ("int32",), 0, rolled=False, doc="in a Batch only: the token predicted at row p"),
    ColumnSpec("positions", "token", ("int32",), 0, rolled=False, doc="in a Batch only: index of row p in its sample"),
    ColumnSpec("temperatures", "token", ("float32",), 1.0, doc="in a Batch only: temperature the predicted token was sampled at"),
    ColumnSpec("images", "attachment", (), None, rolled=False, split="whole", doc="pixel tensors over their placeholder tokens"),
    ColumnSpec("audio", "attachment", (), None, rolled=False, split="whole", doc="audio features over their placeholder tokens"),
):
    register_column(_spec)


# ---- what can be done with a column, by kind ------------------------------------------------------------------------


def slice_column(spec: ColumnSpec, column: Column, start: int, end: int) -> Column:
    """Tokens ``start`` to ``end``. An attachment that the cut would split is an error."""
    if isinstance(column, Ragged):
        return column.take(np.arange(start, end))
    if isinstance(column, Attachments):
        kept = [a for a in column.items if a.start < end and a.end > start]
        for a in kept:
            if a.start < start or a.end > end:
                raise DataError(f"column {spec.name!r}: cutting at [{start}, {end}) would split the attachment over [{a.start}, {a.end})")
        return Attachments(tuple(Attachment(a.start - start, a.end - start, a.blob) for a in kept), end - start)
    return column[start:end]


def concat_columns(spec: ColumnSpec, columns: Sequence[Column]) -> Column:
    """One column after another; all of one dtype and trailing shape."""
    if spec.kind != "attachment":
        arrays = [c.values if isinstance(c, Ragged) else c for c in columns if not isinstance(c, Attachments)]
        if len({(a.dtype, a.shape[1:]) for a in arrays}) > 1:
            forms = sorted({f"{a.dtype.name} {list(a.shape[1:])}" for a in arrays})
            raise DataError(f"column {spec.name!r}: cannot concatenate different dtypes or trailing shapes: {', '.join(forms)}")
    if spec.kind == "ragged":
        parts = [c for c in columns if isinstance(c, Ragged)]
        shifts = np.cumsum([0] + [len(c.values) for c in parts])
        offsets = [np.zeros(1, np.int64)] + [c.offsets[1:] + s for c, s in zip(parts, shifts[:-1], strict=True)]
        return Ragged(np.concatenate([c.values for c in parts]), np.concatenate(offsets))
    if spec.kind == "attachment":
        items: list[Attachment] = []
        length = 0
        for column in columns:
            assert isinstance(column, Attachments)
            items += [Attachment(a.start + length, a.end + length, a.blob) for a in column.items]
            length += column.length
        return Attachments(tuple(items), length)
    return np.concatenate(columns)  # ty: ignore[no-matching-overload]


def take_rows(spec: ColumnSpec, column: Column, rows: np.ndarray) -> Column:
    """The given rows (int64) of a packed column, −1 gives the fill. Attachments are not taken by rows: they go whole."""
    if isinstance(column, Attachments):
        raise DataError(f"column {spec.name!r}: attachments are split whole, not by rows")
    if isinstance(column, Ragged):
        return column.take(rows)
    taken = column[rows]
    taken[rows < 0] = spec.fill_for(column.dtype)
    return taken


def empty_column(spec: ColumnSpec, length: int, like: Column | None = None) -> Column:
    """A column of ``length`` tokens in which nothing was recorded, with the dtype and trailing shape of ``like``."""
    if spec.kind == "ragged":
        values = like.values[:0] if isinstance(like, Ragged) else np.zeros((0,) * (1 + spec.trailing), spec.dtypes[0])
        return Ragged(values, np.zeros(length + 1, np.int64))
    if spec.kind == "attachment":
        return Attachments((), length)
    dtype = like.dtype if isinstance(like, np.ndarray) else np.dtype(spec.dtypes[0])
    trailing = like.shape[1:] if isinstance(like, np.ndarray) else (0,) * spec.trailing
    return np.full((length, *trailing), spec.fill_for(dtype), dtype)


CLASSES: dict[Kind, type] = {"token": np.ndarray, "ragged": Ragged, "attachment": Attachments}


@cache
def _name(dtype: np.dtype) -> str:
    """``dtype.name``, which NumPy puts together anew each time."""
    return dtype.name


def check_column(spec: ColumnSpec, column: Column, length: int) -> str | None:
    """What is wrong with the form of a column of a sample of ``length`` tokens, or None."""
    expected = CLASSES[spec.kind]
    if not isinstance(column, expected):
        return f"is a {type(column).__name__}, but {spec.kind} columns are {expected.__name__}"
    if len(column) != length:
        return f"has {len(column)} rows, but the sample has {length} tokens"
    if isinstance(column, Attachments):
        for a in column.items:
            if not 0 <= a.start < a.end <= length:
                return f"has an attachment over [{a.start}, {a.end}), empty or outside [0, {length})"
        spans = [(a.start, a.end) for a in column.items]
        return None if spans == sorted(spans) else f"has attachments out of order: {spans}"
    values = column.values if isinstance(column, Ragged) else column
    if _name(values.dtype) not in spec.dtypes:
        return f"has dtype {values.dtype}, expected {' or '.join(spec.dtypes)}"
    if values.ndim != 1 + spec.trailing:
        return f"has shape {list(values.shape)}, expected {1 + spec.trailing} axes"
    if isinstance(column, Ragged):
        if column.offsets.dtype != np.int64:
            return f"has offsets of dtype {column.offsets.dtype}, expected int64"
        steps = np.diff(column.offsets)
        if column.offsets[0] != 0 or column.offsets[-1] != len(values) or (steps < 0).any():
            return f"has offsets that do not rise from 0 to {len(values)}"
    return None
