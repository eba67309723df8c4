"""A prefix shared by m branches of a trajectory is trained once, with the mean of the branch advantages (DESIGN §2)."""

from __future__ import annotations

import numpy as np

from .batch import Batch
from .sample import Sample


def common_prefix(a: Sample, b: Sample) -> int:
    """Number of leading tokens that are the same tokens: same ids and, where sampled, same version and logprob."""
    n = min(len(a), len(b))
    same = (a.tokens[:n] == b.tokens[:n]) & (a.versions[:n] == b.versions[:n])
    same &= (a.logprobs[:n] == b.logprobs[:n]) | (a.versions[:n] < 0)
    return n if same.all() else int(np.argmin(same))


def row_owners(batch: Batch) -> np.ndarray | None:
    """int64 [N]: the row that trains what row p predicts (itself, or the same row of an earlier branch); None if nothing is shared."""
    owners = np.arange(batch.n_rows)
    mask, shared = batch.array("loss_mask"), False
    alive = batch.segments.sequence_tokens > 0  # a sample that a filter took out owns nothing
    trajectory = batch.segments.trajectory
    for t in np.flatnonzero(np.bincount(trajectory, weights=alive) > 1):
        # By branch, in whatever order they stand: who trains a shared row decides how long sequences are.
        members = sorted(np.flatnonzero((trajectory == t) & alive), key=lambda s: (batch.refs[s].id.branch, s))
        samples = {int(s): batch.refs[s].get() for s in members}
        for i, s in enumerate(members[1:], start=1):
            for first in members[:i][::-1]:  # the earliest branch is written last and wins
                rows = common_prefix(samples[int(first)], samples[int(s)]) - 1  # row p predicts token p + 1
                if rows > 0:
                    here = batch.cu_seqlens[s] + np.arange(rows)
                    there = batch.cu_seqlens[first] + np.arange(rows)
                    alike = mask[here] == mask[there]
                    owners[here[alike]] = there[alike]
                    shared = True
    return owners if shared else None


def train_once(batch: Batch, owners: np.ndarray) -> Batch:
    """The loss mask without the rows that another row trains, and denominators to match."""
    mask = batch.array("loss_mask") & (owners == np.arange(batch.n_rows))
    return batch.with_columns({"loss_mask": mask}).counted()


def mean_over_branches(advantages: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """float [N]: every row holds the mean of the advantages of all rows with the same owner."""
    total = np.bincount(owners, weights=advantages, minlength=len(owners))
    count = np.bincount(owners, minlength=len(owners))
    return (total / np.maximum(count, 1))[owners].astype(advantages.dtype)
