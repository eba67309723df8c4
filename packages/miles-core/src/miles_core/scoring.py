"""Rewards: named parts, each a function of one sample, a group or a batch; a trajectory's reward is their weighted sum."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .calls import call_each
from .errors import DataError, InfrastructureFailure, MilesError, RunError
from .plugins import RewardConfig
from .protocols import BuildContext, Reward, Score
from .rewards.weighted_sum import WeightedSum
from .sample import Sample
from .waiting import deadline, gather, in_daemon_thread, is_async

THREADS = 32
"""Plain functions that run at once; the next waits for its turn, and its deadline starts then."""

ADVICE = "Raise the reward's timeout_s, or mend the function."


class Scorer:
    """Calls the rewards of a stage, all at once, with a deadline each, and checks what they give.

    The parts of a ``weighted_sum`` are called like any other reward; their names are ``sum/part``, ``sum/inner/part`` …
    """

    def __init__(self, configs: Mapping[str, RewardConfig], context: BuildContext, environment_weight: float = 1.0):
        self._weights = {"environment": environment_weight} | {name: config.weight for name, config in configs.items()}
        self._sums: dict[str, dict[str, float]] = {}  # of each weighted_sum the weights of its parts; inner sums come first
        self._rewards: dict[str, tuple[RewardConfig, Reward]] = {}
        self._threads = asyncio.Semaphore(THREADS)
        for name, config in configs.items():
            self._add(name, config, context)

    def _add(self, name: str, config: RewardConfig, context: BuildContext) -> None:
        if not isinstance(config, WeightedSum):
            self._rewards[name] = config, config.build(context)
            return
        for part, inner in config.parts.items():
            self._add(f"{name}/{part}", inner, context)
        self._sums[name] = {f"{name}/{part}": inner.weight for part, inner in config.parts.items()}

    async def score_group(self, samples: Sequence[Sample]) -> None:
        """Rewards of one sample and of a group, as soon as a group is complete; then the sum.

        What a rollout set as ``reward`` itself counts as the environment's part.

        Raises:
            DataError: A reward gave what is no reward, or samples of a trajectory contradict each other.
            RunError: A reward failed or took too long.
            InfrastructureFailure: A service that a reward asks failed; the group is to be issued again.
        """
        for sample in samples:
            if sample.reward is not None:
                sample.rewards.setdefault("environment", sample.reward)
        await self._score(samples, ("sample", "group"))

    async def score_batch(self, samples: Sequence[Sample]) -> None:
        """Rewards of a whole batch, which nobody can issue again. Raises as ``score_group``, RunError for an InfrastructureFailure."""
        try:
            await self._score(samples, ("batch",))
        except InfrastructureFailure as failure:
            raise RunError(str(failure)) from failure

    @property
    def has_batch_rewards(self) -> bool:
        """Whether ``score_batch`` has something to do."""
        return any(config.called_with() == "batch" for config, _ in self._rewards.values())

    async def _score(self, samples: Sequence[Sample], units: Collection[str]) -> None:
        heads = _heads(samples)
        asked = [name for name, (config, _) in self._rewards.items() if config.called_with() in units]
        for name, scores in zip(asked, await gather(self._ask(name, heads) for name in asked), strict=True):
            _set_parts(name, samples, heads, scores)
        self._total(samples)

    async def _ask(self, name: str, heads: Sequence[Sample]) -> list[Score]:
        """What a reward says of each."""
        config, reward = self._rewards[name]
        if config.called_with() != "sample":
            return await self._call(name, list(heads), heads)
        if is_async(reward):
            return [score for [score] in await gather(self._call(name, head, [head]) for head in heads)]

        def score(head: Sample) -> Score:
            with _named(_subject(name, [head])):
                return _checked(name, _plain(reward(head)), head)

        def late(head: Sample) -> str:
            return f"{_subject(name, [head])} waited {config.timeout_s:g} s for its function {_described(reward)}. {ADVICE}"

        return await call_each(score, heads, self._threads, math.inf if config.keeps_time else config.timeout_s, late)

    async def _call(self, name: str, argument: Any, scored: Sequence[Sample]) -> list[Score]:
        """Scores of ``scored`` by one call, checked."""
        config, reward = self._rewards[name]
        subject, unit = _subject(name, scored), config.called_with()
        with _named(subject):
            given = _plain(await self._timed(config, reward, argument, subject))
        if unit == "sample":
            given = [given]
        elif not isinstance(given, list | tuple) or len(given) != len(scored):
            found = len(given) if isinstance(given, list | tuple) else repr(given)
            raise DataError(f"{subject}: a {unit} reward gives one number for each of {len(scored)} samples; found {found}")
        return [_checked(name, value, sample) for value, sample in zip(given, scored, strict=True)]

    async def _timed(self, config: RewardConfig, reward: Reward, argument: Any, subject: str) -> Any:
        """What a reward gives within its deadline: an async one here, a plain one in a thread."""

        async def held(running: Any) -> Any:
            if config.keeps_time:
                return await running
            return await deadline(running, config.timeout_s, subject, f"its function {_described(reward)}", ADVICE)

        if is_async(reward):
            return await held(reward(argument))
        async with self._threads:
            return await held(in_daemon_thread(reward, argument))

    def _total(self, samples: Sequence[Sample]) -> None:
        """``reward`` = Σ weight · part, the environment's included; without any part it stays None.

        A trajectory has one reward: a part that only some of its samples have counts for all of them.
        """
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
            for name, weights in self._sums.items():
                if (value := _weighted(sample.rewards, weights)) is not None:
                    sample.rewards[name] = value
            total = _weighted(sample.rewards, self._weights)
            if total is not None:
                sample.reward = total
            elif sample.rewards:
                raise DataError(
                    f"sample {sample.id} has the reward parts {', '.join(sample.rewards)}, and none of them counts; "
                    "a rollout sets rewards['environment'] or reward"
                )


def _subject(name: str, scored: Sequence[Sample]) -> str:
    return f"reward {name!r} of sample {scored[0].id}" + (f" and {len(scored) - 1} more" if len(scored) > 1 else "")


@contextmanager
def _named(subject: str) -> Generator[None]:
    """What user code raises becomes a RunError that names the reward and the sample; Miles' own errors go on as they are."""
    try:
        yield
    except (MilesError, InfrastructureFailure):
        raise
    except (Exception, SystemExit) as error:
        raise RunError(f"{subject} failed: {type(error).__name__}: {error}") from error


Trajectory = tuple[str, str, int]


def _trajectory(sample: Sample) -> Trajectory:
    return sample.id.policy, sample.id.group, sample.id.trajectory


def _heads(samples: Sequence[Sample]) -> list[Sample]:
    """The last sample of each trajectory and policy: the one that a reward looks at."""
    return list({_trajectory(s): s for s in samples}.values())


def _set_parts(name: str, samples: Sequence[Sample], heads: Sequence[Sample], scores: Sequence[Score]) -> None:
    by_trajectory = {_trajectory(h): s for h, s in zip(heads, scores, strict=True)}
    for sample in samples:
        score = by_trajectory[_trajectory(sample)]
        sample.rewards[name] = score.reward
        sample.rewards |= {f"{name}/{part}": value for part, value in score.parts.items()}


def _weighted(parts: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """Σ weight · part over the parts that are there and have a weight; None if there is none."""
    counted = [weights[name] * value for name, value in parts.items() if name in weights]
    return sum(counted) if counted else None


def _described(function: Any) -> str:
    """``module:name`` of a function, of what a partial calls, or of an object's class."""
    function = getattr(function, "func", function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def _plain(value: Any) -> Any:
    """What NumPy or torch gave, as Python's own numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _checked(name: str, given: Any, sample: Sample) -> Score:
    """A score of finite numbers, from a number or a score."""
    if not isinstance(given, Score):
        return Score(_finite(name, given, sample))
    return Score(_finite(name, given.reward, sample), {part: _finite(f"{name}/{part}", v, sample) for part, v in given.parts.items()})


def _finite(name: str, value: Any, sample: Sample) -> float:
    number = _plain(value)
    if not isinstance(number, bool | int | float) or not math.isfinite(number):
        raise DataError(f"reward {name!r} of sample {sample.id} is {value!r}; a reward is one finite number")
    return float(number)
