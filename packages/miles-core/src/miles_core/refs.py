"""What the controller holds instead of samples: ids, lengths, rewards, versions and a handle to where the data stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .sample import Group, Sample, SampleId, Status


@runtime_checkable
class Handle(Protocol):
    """Where a sample lives. Inline that is the sample itself; a cluster puts shared memory or an object store behind it."""

    def get(self) -> Sample:
        """The sample, pulled to this process if it is elsewhere."""
        ...


@dataclass(frozen=True)
class InlineHandle:
    """The sample is in this process."""

    sample: Sample

    def get(self) -> Sample:
        """The sample."""
        return self.sample


@dataclass(frozen=True)
class SampleRef:
    """A sample without its data.

    Attributes:
        id: Which sample.
        length: T, all tokens.
        sampled: Tokens the policy sampled.
        trained: Tokens under the loss mask.
        reward: The trajectory's reward, None where the rollout gives none (SFT).
        rewards: Its named parts, before weighting.
        versions: Oldest and newest weight version among the sampled tokens; (−1, −1) if none was sampled.
        status: How it ended.
        handle: Where the data are.
    """

    id: SampleId
    length: int
    sampled: int
    trained: int
    reward: float | None
    rewards: Mapping[str, float]
    versions: tuple[int, int]
    status: Status
    handle: Handle

    @staticmethod
    def of(sample: Sample, handle: Handle | None = None) -> SampleRef:
        """The ref of a sample that is at hand."""
        sampled = sample.versions[sample.versions >= 0]
        span = (int(sampled.min()), int(sampled.max())) if len(sampled) else (-1, -1)
        trained = int(sample.loss_mask.sum())
        return SampleRef(
            id=sample.id,
            length=len(sample),
            sampled=len(sampled),
            trained=trained,
            reward=sample.reward,
            rewards=sample.rewards,
            versions=span,
            status=sample.status,
            handle=handle or InlineHandle(sample),
        )

    def get(self) -> Sample:
        """The sample."""
        return self.handle.get()


@dataclass(frozen=True)
class GroupRef:
    """The refs of one prompt's trajectories, and where in the data they came from.

    Attributes:
        id: Group id.
        position: Position in the data source's order (what a cut must issue again if the group is lost).
        refs: One for each sample.
    """

    id: str
    position: int
    refs: tuple[SampleRef, ...]

    def get(self) -> Group:
        """The group with its samples."""
        return Group(self.id, [r.get() for r in self.refs])

    @staticmethod
    def of(group: Group, position: int) -> GroupRef:
        """The ref of a group that is at hand."""
        return GroupRef(group.id, position, tuple(SampleRef.of(s) for s in group.samples))


def policies_of(groups: Sequence[GroupRef]) -> list[str]:
    """Names of the policies that have samples in these groups, in order of appearance."""
    return list(dict.fromkeys(r.id.policy for g in groups for r in g.refs))
