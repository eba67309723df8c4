"""Options of the corrections between rollout and trainer; what they compute is told in ``miles_core.algorithms.corrections``."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..plugins import PluginConfig

Level = Literal["token", "sequence", "geometric"]
"""What a ratio is of. token: each by itself; sequence: the product over a sample's trained tokens; geometric: their geometric mean."""
Statistic = Literal["k1", "k2", "k3"]
"""A divergence at each token, with d = log π_trainer − log π_rollout. k1: −d; k2: d² / 2; k3: exp(d) − 1 − d."""
Reduce = Literal["none", "sum", "mean", "max"]
"""Over the trained tokens of a sample. none: not at all, each token is judged by itself."""


class CorrectionConfig(PluginConfig):
    """What every correction compares."""

    point: ClassVar[str] = "ratio_correction"
    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs", "logprobs"})


class BoundedConfig(CorrectionConfig):
    """What every correction with bounds of a ratio has; subclasses give the defaults."""

    low: float = Field(0.0, ge=0)
    """Lower bound of the ratio trainer / rollout, itself inside."""
    high: float = Field(2.0, gt=0)
    """Upper bound of the ratio, itself inside; ``.inf`` for none."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high}), so no ratio would be inside; exchange them")
        return self


class Tis(BoundedConfig):
    """Truncated importance sampling: weights are ratios within bounds."""

    target: ClassVar[str] = "miles_core.algorithms.corrections:tis"

    level: Level = "token"
    """What the ratio is of (``Level``)."""


class Mis(BoundedConfig):
    """Masked importance sampling: what is outside the bounds leaves the batch; weights are the ratios."""

    target: ClassVar[str] = "miles_core.algorithms.corrections:mis"

    level: Level = "token"
    """What the ratio is of (``Level``)."""
    low: float = Field(0.5, ge=0)
    """Lower bound of the ratio trainer / rollout, itself inside."""


class IcePop(BoundedConfig):
    """Weights are token ratios, and 0 outside the bounds."""

    target: ClassVar[str] = "miles_core.algorithms.corrections:icepop"

    low: float = Field(0.5, ge=0)
    """Lower bound of the ratio trainer / rollout, itself inside."""
    high: float = Field(5.0, gt=0)
    """Upper bound of the ratio, itself inside; ``.inf`` for none."""


class SequenceMaskTis(BoundedConfig):
    """Weights are token ratios of the sequences whose geometric mean ratio is within bounds, 0 on the others."""

    target: ClassVar[str] = "miles_core.algorithms.corrections:sequence_mask_tis"

    low: float = Field(0.999, ge=0)
    """Lower bound of a sequence's geometric mean ratio, itself inside."""
    high: float = Field(1.002, gt=0)
    """Upper bound of a sequence's geometric mean ratio, itself inside."""


class Veto(CorrectionConfig):
    """One token that the trainer finds next to impossible takes its sequence out of the batch."""

    target: ClassVar[str] = "miles_core.algorithms.corrections:veto"

    threshold: float = Field(1e-4, gt=0, lt=1)
    """A token's ratio trainer / rollout below this vetoes."""


class Reject(CorrectionConfig):
    """Sequences (or tokens) that diverge too far leave the batch."""

    target: ClassVar[str] = "miles_core.algorithms.corrections:reject"

    statistic: Statistic = "k3"
    """The divergence (``Statistic``); k1 counts by its magnitude."""
    reduce: Reduce = "mean"
    """How it is reduced over a sequence (``Reduce``)."""
    threshold: float = Field(gt=0)
    """Above this it is rejected, in nats. Sensible ones differ by orders between statistics, so none is the default."""


class OffPolicyMask(CorrectionConfig):
    """No learning from bad sequences that the policy has left behind."""

    target: ClassVar[str] = "miles_core.algorithms.corrections:off_policy_mask"
    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs", "logprobs", "advantages"})

    threshold: float = Field(gt=0)
    """A sequence's mean of log π_rollout − log π_trainer above this masks its rows with A < 0. DeepSeek published none; slime has
    1e-4 (for one engine and trainer), TRL's documentation 0.5."""
