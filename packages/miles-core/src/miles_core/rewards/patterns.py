"""``reward: regex``, and patterns for other rewards: searched with a deadline, because what a policy writes may keep one busy for ever.

The library ``regex`` reads the syntax of Python's ``re``, and unlike it keeps time and lets other threads run.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from ..errors import RunError
from ..plugin_finding import EXTRAS
from ..plugins import RewardConfig
from ..protocols import BuildContext
from ..sample import Sample
from .texts import ends_of_text, response_of


@functools.cache
def compiled(pattern: str) -> Any:
    """A pattern of the library ``regex``. Raises ValueError, a sentence, when it does not compile or the library is missing."""
    try:
        import regex
    except ModuleNotFoundError:
        raise ValueError(f"patterns need the library regex; pip install '{EXTRAS['regex']}'") from None
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}; in YAML, write it between single quotes") from None


def _compiles(pattern: str) -> str:
    compiled(pattern)
    return pattern


def _has_one_group(pattern: str) -> str:
    if (groups := compiled(pattern).groups) != 1:
        raise ValueError(f"{pattern!r} has {groups} groups; put one pair of parentheses, around what is wanted ((?:…) is no group)")
    return pattern


PatternText = Annotated[str, AfterValidator(_compiles)]
"""A regular expression."""
ExtractorText = Annotated[str, AfterValidator(_has_one_group)]
"""A regular expression whose only group is what is wanted; its last match counts."""


def matches(pattern: str, text: str, seconds: float, subject: str) -> bool:
    """Whether a pattern matches anywhere in a text. Raises RunError past so many seconds."""
    try:
        return compiled(pattern).search(text, timeout=seconds) is not None
    except TimeoutError:
        raise _too_long(pattern, text, seconds, subject) from None


def extract(pattern: str, text: str, seconds: float, subject: str) -> str | None:
    """What the group of the last match holds; None without a match, or when the group took no part in it. Raises RunError past so many
    seconds."""
    found = None
    try:
        for match in compiled(pattern).finditer(text, timeout=seconds):
            found = match
    except TimeoutError:
        raise _too_long(pattern, text, seconds, subject) from None
    return found and found[1]


def _too_long(pattern: str, text: str, seconds: float, subject: str) -> RunError:
    return RunError(
        f"{subject}: {pattern!r} was not done with {len(text)} characters within {seconds:g} s ({text[:60]!r} …); a pattern that repeats "
        "what repeats, as (a+)+ does, takes for ever on some texts: write it without, or raise timeout_s"
    )


class Regex(RewardConfig):
    """Options of ``reward: regex``: 1.0 if the pattern matches anywhere in the response, else 0.0.

    To compare what a pattern finds with the label, use ``exact_match`` with ``answer``.
    """

    point: ClassVar[str] = "reward"
    target: ClassVar[str] = "miles_core.rewards.patterns:RegexReward"
    keeps_time: ClassVar[bool] = True

    pattern: PatternText
    """A regular expression; ``\\A…\\Z`` makes it one of the whole response, ``(?s)`` lets ``.`` match line ends, ``(?i)`` ignores case."""


class RegexReward:
    """Searches ``metadata["response"]``, without the end of text at its end."""

    def __init__(self, config: Regex, context: BuildContext):
        self.config, self._ends = config, ends_of_text(context)

    def __call__(self, sample: Sample) -> float:
        """1.0 or 0.0.

        Raises:
            DataError: The sample has no response.
            RunError: The pattern took longer than ``timeout_s``.
        """
        response = response_of(sample, self._ends, "regex")
        return float(matches(self.config.pattern, response, self.config.timeout_s, f"reward regex of sample {sample.id}"))
