"""Rewards: named parts, each a function of one sample, a group or a batch; a trajectory's reward is their weighted sum."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import DataError, MilesError, RunError
from .plugins import RewardConfig
from .protocols import BuildContext, Reward
from .sample import Sample
from .waiting import deadline, gather, in_daemon_thread


class Scorer:
    """Calls the rewards of a stage, with a deadline each, and checks what they give."""

    def __init__(self, configs: Mapping[str, RewardConfig], context: BuildContext):
        self.rewards: dict[str, tuple[RewardConfig, Reward]] = {n: (c, c.build(context)) for n, c in configs.items()}

    async def score_group(self, samples: Sequence[Sample]) -> None:
        """Rewards of one sample and of a group, as soon as a group is complete; then the sum (see ``total``)."""
        heads = _heads(samples)
        for name, (config, reward) in self.rewards.items():
            if config.unit == "sample":
                values = await gather(self._call(name, config, reward, head, [head]) for head in heads)
                _set_parts(name, samples, heads, [v for [v] in values])
            elif config.unit == "group":
                _set_parts(name, samples, heads, await self._call(name, config, reward, heads, heads))
        self._total(samples)

    async def score_batch(self, samples: Sequence[Sample]) -> None:
        """Rewards of a whole batch."""
        heads = _heads(samples)
        for name, (config, reward) in self.rewards.items():
            if config.unit == "batch":
                _set_parts(name, samples, heads, await self._call(name, config, reward, heads, heads))
        self._total(samples)

    @property
    def has_batch_rewards(self) -> bool:
        """Whether ``score_batch`` has something to do."""
        return any(config.unit == "batch" for config, _ in self.rewards.values())

    async def _call(self, name: str, config: RewardConfig, reward: Reward, argument: Any, scored: Sequence[Sample]) -> list[float]:
        """Values for ``scored``, checked."""
        subject = f"reward {name!r} of sample {scored[0].id}" + (f" and {len(scored) - 1} more" if len(scored) > 1 else "")
        called = reward(argument) if _is_async(reward) else in_daemon_thread(reward, argument)
        try:
            given = await deadline(called, config.timeout_s, subject, "its function", "Raise the reward's timeout_s, or mend the function.")
        except MilesError:
            raise
        except Exception as error:
            raise RunError(f"{subject} failed: {type(error).__name__}: {error}") from error
        if config.unit == "sample":
            given = [given]
        elif not isinstance(given, Sequence) or len(given) != len(scored):
            found = len(given) if isinstance(given, Sequence) else type(given).__name__
            raise DataError(f"{subject}: a {config.unit} reward gives one number for each of {len(scored)} samples; found {found}")
        for value, sample in zip(given, scored, strict=True):
            scalar = isinstance(value, bool | int | float) or getattr(value, "ndim", None) == 0
            if not scalar or not math.isfinite(value):
                raise DataError(f"reward {name!r} of sample {sample.id} is {value!r}; a reward is one finite number")
        return [float(v) for v in given]

    def _total(self, samples: Sequence[Sample]) -> None:
        """``reward`` = the environment's part + Σ weight · part; samples without any part keep None."""
        for sample in samples:
            weights = {"environment": 1.0} | {n: c.weight for n, (c, _) in self.rewards.items()}
            parts = [weights.get(n, 0.0) * v for n, v in sample.rewards.items()]
            if parts:
                sample.reward = sum(parts)


def _heads(samples: Sequence[Sample]) -> list[Sample]:
    """The last sample of each trajectory and policy: the one that a reward looks at."""
    return list({(s.id.policy, s.id.group, s.id.trajectory): s for s in samples}.values())


def _set_parts(name: str, samples: Sequence[Sample], heads: Sequence[Sample], values: Sequence[float]) -> None:
    by_trajectory = {(h.id.policy, h.id.group, h.id.trajectory): v for h, v in zip(heads, values, strict=True)}
    for sample in samples:
        sample.rewards[name] = by_trajectory[sample.id.policy, sample.id.group, sample.id.trajectory]


def _is_async(function: Any) -> bool:
    function = getattr(function, "func", function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
