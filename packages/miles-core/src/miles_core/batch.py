"""Batch: packed samples, flat columns and ``cu_seqlens``, no padding.

Packing rolls the loss columns once, by −1 within each sample, before any split: **row p of a Batch speaks of the token
predicted AT p**; the last row of a sample predicts nothing and holds the fill. ``unpack`` rolls results back::

    Sample   token        Q     a     b          loss_mask   .  x  x         logprobs   nan  −1   −2
    Batch    tokens       Q     a     b          loss_mask   x  x  .         logprobs   −1   −2   nan
             targets      a     b     0

A Batch also carries the denominators of its optimizer step (``Segments``): a micro-batch or a shard keeps them, so that its
loss is its exact share of the step's loss, however the step was cut up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import Column, column_spec, concat_columns, empty_column, take_rows
from .errors import DataError
from .refs import SampleRef
from .sample import trajectory_reward

if TYPE_CHECKING:
    import torch

GATHERED = ("versions", "loss_mask", "logprobs")
"""The Sample columns that the controller gathers; the others stay with the samples until a trainer loads them."""


@dataclass(frozen=True)
class Segments:
    """Which samples belong together, and what one optimizer step divides by.

    All arrays are int64 [S]; a sample's trajectory and group are indices over the whole batch. The counts are over the
    OPTIMIZER STEP (after filters), not over the shard or micro-batch that this object was cut down to.

    Attributes:
        trajectory: Index of each sample's trajectory.
        group: Index of each sample's group.
        sequence_tokens: Trained tokens of each sample.
        trajectory_tokens: Trained tokens of each sample's trajectory, over all its samples.
        tokens: Trained tokens of the step.
        sequences: Samples with at least one trained token.
        trajectories: Trajectories with at least one trained token.
    """

    trajectory: np.ndarray
    group: np.ndarray
    sequence_tokens: np.ndarray
    trajectory_tokens: np.ndarray
    tokens: int
    sequences: int
    trajectories: int

    @staticmethod
    def of(trajectory: np.ndarray, group: np.ndarray, sequence_tokens: np.ndarray) -> Segments:
        """Denominators of a step made of exactly these samples."""
        per_trajectory = np.bincount(trajectory, weights=sequence_tokens, minlength=1).astype(np.int64)
        return Segments(
            trajectory=trajectory,
            group=group,
            sequence_tokens=sequence_tokens,
            trajectory_tokens=per_trajectory[trajectory],
            tokens=int(sequence_tokens.sum()),
            sequences=int((sequence_tokens > 0).sum()),
            trajectories=int((per_trajectory > 0).sum()),
        )

    def select(self, samples: np.ndarray) -> Segments:
        """A part of the step: fewer samples, the same denominators."""
        names = ("trajectory", "group", "sequence_tokens", "trajectory_tokens")
        return replace(self, **{name: getattr(self, name)[samples] for name in names})


@dataclass(frozen=True)
class Batch:
    """Packed samples.

    Attributes:
        refs: One for each of the S samples, in packed order.
        cu_seqlens: int64 [S + 1]; sample s owns rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``.
        columns: Packed columns [N, …] by name.
        segments: What belongs together, and the step's denominators.
        steps: Sample indices of each optimizer step that this batch is to be used for, in order.
        owners: int64 [N], the row that trains what row p predicts, where branches share a prefix (``prefixes``); else None.
    """

    refs: tuple[SampleRef, ...]
    cu_seqlens: np.ndarray
    columns: dict[str, Column]
    segments: Segments
    steps: tuple[np.ndarray, ...] = field(default=())
    owners: np.ndarray | None = None

    @staticmethod
    def of(refs: Sequence[SampleRef], columns: Sequence[str] = GATHERED) -> Batch:
        """Pack samples, one optimizer step over all of them.

        Args:
            refs: Samples of one policy.
            columns: Sample columns to gather; a sample that lacks one gives rows of its fill.
        """
        if not refs:
            raise DataError("an empty batch: no sample is left to train on")
        if len(policies := sorted({r.id.policy for r in refs})) > 1:
            raise DataError(f"a batch holds samples of one policy; these are of {', '.join(policies)}")
        cu_seqlens = np.concatenate([[0], np.cumsum([r.length for r in refs])]).astype(np.int64)
        trajectory = _index([(r.id.group, r.id.trajectory) for r in refs])
        group = _index([r.id.group for r in refs])
        batch = Batch(tuple(refs), cu_seqlens, {}, Segments.of(trajectory, group, np.zeros(len(refs), np.int64))).load(columns)
        return batch.counted().with_steps([np.arange(len(refs))])

    def __len__(self) -> int:
        """S, the number of samples."""
        return len(self.refs)

    @property
    def n_rows(self) -> int:
        """N, the number of packed rows."""
        return int(self.cu_seqlens[-1])

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]: rows of each sample."""
        return np.diff(self.cu_seqlens)

    @property
    def segment(self) -> np.ndarray:
        """int64 [N]: index of the sample that each row belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def rewards(self) -> np.ndarray:
        """float64 [S], each sample's trajectory's reward (see ``trajectory_reward``); NaN where no sample of it has one (SFT)."""
        members: dict[int, list[SampleRef]] = {}
        for trajectory, ref in zip(self.segments.trajectory.tolist(), self.refs, strict=True):
            members.setdefault(trajectory, []).append(ref)
        reward = {t: trajectory_reward(refs) if any(r.reward is not None for r in refs) else np.nan for t, refs in members.items()}
        return np.array([reward[t] for t in self.segments.trajectory.tolist()])

    def array(self, name: str) -> np.ndarray:
        """A packed token column [N, …]."""
        column = self.columns.get(name)
        if not isinstance(column, np.ndarray):
            raise DataError(f"the batch has no token column {name!r}; it has {', '.join(self.columns)}")
        return column

    def tensors(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Every token column as a torch tensor [N, …] by name; with ``load`` before, ``tokens`` and ``targets`` too."""
        import torch

        return {n: torch.from_numpy(np.ascontiguousarray(c)).to(device) for n, c in self.columns.items() if isinstance(c, np.ndarray)}

    def with_columns(self, columns: Mapping[str, Column]) -> Batch:
        """The same rows with columns added or replaced; each has N rows, already rolled."""
        for name, column in columns.items():
            if len(column) != self.n_rows:
                raise DataError(f"column {name!r} has {len(column)} rows, the batch has {self.n_rows}")
        return replace(self, columns=self.columns | dict(columns))

    def with_steps(self, steps: Sequence[np.ndarray]) -> Batch:
        """The same batch, to be used for these optimizer steps (arrays of sample indices)."""
        return replace(self, steps=tuple(steps))

    def counted(self) -> Batch:
        """The same rows as ONE optimizer step: denominators counted anew from ``loss_mask``."""
        tokens = np.bincount(self.segment[self.array("loss_mask")], minlength=len(self))
        return replace(self, segments=Segments.of(self.segments.trajectory, self.segments.group, tokens))

    @property
    def ends(self) -> np.ndarray:
        """bool [N]: the last row of each sample. A context-parallel shard tells by its ``positions``."""
        whole = np.array([r.length for r in self.refs])
        if (self.lengths == whole).all():
            ends = np.zeros(self.n_rows, bool)
            ends[self.cu_seqlens[1:] - 1] = True
            return ends
        return self.array("positions") + 1 == whole[self.segment]

    def load(self, names: Sequence[str]) -> Batch:
        """Pull Sample columns from where the samples live, pack and roll them. Columns the batch already has are kept.

        ``targets``, ``positions`` and ``temperatures`` are derived from tokens and sampling spans.
        """
        missing = [n for n in names if n not in self.columns]
        if not missing:
            return self
        samples = [r.get() for r in self.refs]
        loaded: dict[str, Column] = {}
        for name in missing:
            spec = column_spec(name)
            if name == "targets":
                loaded[name] = take_rows(spec, np.concatenate([s.tokens for s in samples]), self._next_rows())
            elif name == "positions":
                loaded[name] = (np.arange(self.n_rows) - np.repeat(self.cu_seqlens[:-1], self.lengths)).astype(np.int32)
            else:
                parts = [s.temperatures() if name == "temperatures" else s.columns.get(name) for s in samples]
                like = next((p for p in parts if p is not None), None)
                filled = [empty_column(spec, len(s), like) if p is None else p for p, s in zip(parts, samples, strict=True)]
                packed = concat_columns(spec, filled)
                loaded[name] = take_rows(spec, packed, self._next_rows()) if spec.rolled else packed
        return self.with_columns(loaded)

    def _next_rows(self) -> np.ndarray:
        rows = np.arange(1, self.n_rows + 1)
        rows[self.cu_seqlens[1:] - 1] = -1
        return rows

    def rows_of(self, samples: np.ndarray) -> np.ndarray:
        """Row indices (int64) of the given samples, end to end."""
        samples = np.asarray(samples, np.int64)
        lengths = self.lengths[samples]
        before = np.cumsum(lengths) - lengths
        return np.repeat(self.cu_seqlens[samples] - before, lengths) + np.arange(lengths.sum())

    def select(self, samples: Sequence[int] | np.ndarray) -> Batch:
        """Some of the samples as a part (shard, micro-batch) of the same optimizer step: the denominators stay."""
        samples = np.asarray(samples, np.int64)
        if len(samples) == len(self) and (samples == np.arange(len(self))).all():
            kept = {n: c for n, c in self.columns.items() if column_spec(n).split == "rows"}
            return Batch(self.refs, self.cu_seqlens, kept, self.segments)
        rows = self.rows_of(samples)
        cu_seqlens = np.concatenate([[0], np.cumsum(self.lengths[samples])]).astype(np.int64)
        columns = {n: take_rows(column_spec(n), c, rows) for n, c in self.columns.items() if column_spec(n).split == "rows"}
        return Batch(tuple(self.refs[s] for s in samples), cu_seqlens, columns, self.segments.select(samples))

    def optimizer_steps(self) -> Iterator[Batch]:
        """One Batch for each optimizer step, each with denominators of its own.

        Raises:
            DataError: This is a part of a step already (from ``select`` or ``context_shard``); ask the whole batch.
        """
        if not self.steps:
            raise DataError(
                "this batch is a part of an optimizer step and has no steps of its own; take optimizer_steps of the whole batch"
            )
        for samples in self.steps:
            yield self.select(samples).counted()

    def context_rows(self, rank: int, size: int) -> np.ndarray:
        """Rows (int64) that context-parallel rank ``rank`` holds: each sample in 2 × size chunks, a rank takes one from
        each end (zig-zag), so that causal attention costs every rank the same."""
        rows = []
        for start, end in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True):
            bounds = start + (np.arange(2 * size + 1) * (end - start)) // (2 * size)
            for chunk in (rank, 2 * size - 1 - rank):
                rows.append(np.arange(bounds[chunk], bounds[chunk + 1]))
        return np.concatenate(rows)

    def context_shard(self, rank: int, size: int) -> Batch:
        """The rows of ``context_rows``: every sample is here, each with a part of its rows. Load columns before."""
        rows = self.context_rows(rank, size)
        lengths = np.bincount(self.segment[rows], minlength=len(self))
        columns = {n: c if column_spec(n).split == "whole" else take_rows(column_spec(n), c, rows) for n, c in self.columns.items()}
        return replace(self, cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), columns=columns, steps=())

    def unpack(self, name: str) -> list[Column]:
        """A column of each sample in Sample alignment (rolled back), e.g. to write advantages beside the tokens."""
        spec = column_spec(name)
        rows = np.arange(-1, self.n_rows - 1)
        rows[self.cu_seqlens[:-1]] = -1
        column = take_rows(spec, self.columns[name], rows) if spec.rolled else self.columns[name]
        bounds = zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True)
        return [take_rows(spec, column, np.arange(s, e)) for s, e in bounds]


def _index(keys: Sequence) -> np.ndarray:
    numbers: dict = {}
    return np.array([numbers.setdefault(k, len(numbers)) for k in keys], np.int64)
