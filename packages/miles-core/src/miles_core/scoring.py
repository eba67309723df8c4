"""Rewards: named parts, each a function of one sample, a group or a batch; a trajectory's reward is their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import DataError, MilesError, RunError
from .plugins import RewardConfig
from .protocols import BuildContext, Reward
from .sample import Sample
from .waiting import call, deadline, gather


class Scorer:
    """Calls the rewards of a stage, with a deadline each, and checks what they give."""

    def __init__(self, configs: Mapping[str, RewardConfig], context: BuildContext, environment_weight: float = 1.0):
        self.environment_weight = environment_weight
        self.rewards: dict[str, tuple[RewardConfig, Reward]] = {n: (c, c.build(context)) for n, c in configs.items()}

    async def score_group(self, samples: Sequence[Sample]) -> None:
        """Rewards of one sample and of a group, as soon as a group is complete; then the sum.

        What a rollout set as ``reward`` itself counts as the environment's part.
        """
        for sample in samples:
            if sample.reward is not None:
                sample.rewards.setdefault("environment", sample.reward)
        heads = _heads(samples)
        for name, (config, reward) in self.rewards.items():
            if config.unit == "sample":
                values = await gather(self._call(name, config, reward, head, [head]) for head in heads)
                _set_parts(name, samples, heads, [v for [v] in values])
            elif config.unit == "group":
                _set_parts(name, samples, heads, await self._call(name, config, reward, list(heads), heads))
        self._total(samples)

    async def score_batch(self, samples: Sequence[Sample]) -> None:
        """Rewards of a whole batch."""
        heads = _heads(samples)
        for name, (config, reward) in self.rewards.items():
            if config.unit == "batch":
                _set_parts(name, samples, heads, await self._call(name, config, reward, list(heads), heads))
        self._total(samples)

    @property
    def has_batch_rewards(self) -> bool:
        """Whether ``score_batch`` has something to do."""
        return any(config.unit == "batch" for config, _ in self.rewards.values())

    async def _call(self, name: str, config: RewardConfig, reward: Reward, argument: Any, scored: Sequence[Sample]) -> list[float]:
        """Values for ``scored``, checked."""
        subject = f"reward {name!r} of sample {scored[0].id}" + (f" and {len(scored) - 1} more" if len(scored) > 1 else "")
        try:
            advice = "Raise the reward's timeout_s, or mend the function."
            given = await deadline(call(reward, argument), config.timeout_s, subject, "its function", advice)
        except MilesError:
            raise
        except Exception as error:
            raise RunError(f"{subject} failed: {type(error).__name__}: {error}") from error
        given = _plain(given)
        if config.unit == "sample":
            given = [given]
        elif not isinstance(given, list | tuple) or len(given) != len(scored):
            found = len(given) if isinstance(given, list | tuple) else repr(given)
            raise DataError(f"{subject}: a {config.unit} reward gives one number for each of {len(scored)} samples; found {found}")
        return [_finite(name, value, sample) for value, sample in zip(given, scored, strict=True)]

    def _total(self, samples: Sequence[Sample]) -> None:
        """``reward`` = Σ weight · part, the environment's included; without any part it stays None.

        A trajectory has one reward: a part that only some of its samples have counts for all of them.
        """
        weights = {"environment": self.environment_weight} | {n: c.weight for n, (c, _) in self.rewards.items()}
        parts: dict[Trajectory, dict[str, float]] = {}
        for sample in samples:
            found = parts.setdefault(_trajectory(sample), {})
            for name, value in sample.rewards.items():
                if found.setdefault(name, _finite(name, value, sample)) != value:
                    raise DataError(
                        f"reward {name!r} of sample {sample.id} is {value}, but {found[name]} of its trajectory's other samples"
                    )
        for sample in samples:
            sample.rewards = dict(parts[_trajectory(sample)])
            if counted := [weights[n] * v for n, v in sample.rewards.items() if n in weights]:
                sample.reward = sum(counted)
            elif sample.rewards:
                raise DataError(
                    f"sample {sample.id} has the reward parts {', '.join(sample.rewards)}, and none of them counts; "
                    "a rollout sets rewards['environment'] or reward"
                )


Trajectory = tuple[str, str, int]


def _trajectory(sample: Sample) -> Trajectory:
    return sample.id.policy, sample.id.group, sample.id.trajectory


def _heads(samples: Sequence[Sample]) -> list[Sample]:
    """The last sample of each trajectory and policy: the one that a reward looks at."""
    return list({_trajectory(s): s for s in samples}.values())


def _set_parts(name: str, samples: Sequence[Sample], heads: Sequence[Sample], values: Sequence[float]) -> None:
    by_trajectory = {_trajectory(h): v for h, v in zip(heads, values, strict=True)}
    for sample in samples:
        sample.rewards[name] = by_trajectory[_trajectory(sample)]


def _plain(value: Any) -> Any:
    """What NumPy or torch gave, as Python's own numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _finite(name: str, value: Any, sample: Sample) -> float:
    number = _plain(value)
    if not isinstance(number, bool | int | float) or not math.isfinite(number):
        raise DataError(f"reward {name!r} of sample {sample.id} is {value!r}; a reward is one finite number")
    return float(number)
