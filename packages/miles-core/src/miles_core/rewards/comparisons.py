"""``reward: exact_match`` and ``reward: f1``: how well a response agrees with the label."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import ClassVar, Literal

from ..plugins import RewardConfig
from ..protocols import BuildContext
from ..sample import Sample
from .patterns import ExtractorText, extract
from .texts import ends_of_text, references_of, response_of

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _Comparison(RewardConfig):
    """What both have."""

    point: ClassVar[str] = "reward"
    keeps_time: ClassVar[bool] = True

    answer: ExtractorText | None = None
    """A regular expression with one group: what that holds in its last match is compared, and a response without a match gets 0.
    None: the whole response."""


class ExactMatch(_Comparison):
    """Options of ``reward: exact_match``: 1.0 if the answer equals the label, or one of a list of labels, else 0.0."""

    target: ClassVar[str] = "miles_core.rewards.comparisons:ExactMatchReward"

    ignore: tuple[Literal["case", "punctuation", "whitespace"], ...] = ()
    """What does not matter. whitespace: any run of it counts as one space; punctuation: ASCII's. Whitespace at either end never does."""


class F1(_Comparison):
    """Options of ``reward: f1``: how many words answer and label share, as SQuAD counts them; the best of a list of labels."""

    target: ClassVar[str] = "miles_core.rewards.comparisons:F1Reward"


class _Compared:
    """Reads the answer of a sample and what it is compared with."""

    def __init__(self, config: ExactMatch | F1, context: BuildContext):
        self.config, self._ends = config, ends_of_text(context)

    def read(self, sample: Sample) -> tuple[str | None, list[str]]:
        """Answer (None: no match) and references."""
        name, config = self.config.use, self.config
        references, answer = references_of(sample, name), response_of(sample, self._ends, name)
        if config.answer is None:
            return answer, references
        return extract(config.answer, answer, config.timeout_s, f"reward {name} of sample {sample.id}"), references


class ExactMatchReward(_Compared):
    """Compares texts, so that 24 is not 24.0; ``reward: math`` compares what they mean."""

    config: ExactMatch

    def __call__(self, sample: Sample) -> float:
        """1.0 or 0.0.

        Raises:
            DataError: The sample has no response, or its label is no text, number or list of these.
            RunError: The pattern ``answer`` took longer than ``timeout_s``.
        """
        answer, references = self.read(sample)
        ignore = self.config.ignore
        return float(answer is not None and normal(answer, ignore) in {normal(one, ignore) for one in references})


def normal(text: str, ignore: tuple[str, ...]) -> str:
    """A text without what does not matter."""
    if "case" in ignore:
        text = text.casefold()
    if "punctuation" in ignore:
        text = text.translate(NO_PUNCTUATION)
    return " ".join(text.split()) if "whitespace" in ignore else text.strip()


class F1Reward(_Compared):
    """Harmonic mean of precision and recall over words (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1, and its script)."""

    def __call__(self, sample: Sample) -> float:
        """From 0 to 1. Raises as ``exact_match``."""
        answer, references = self.read(sample)
        return 0.0 if answer is None else max(f1(answer, one) for one in references)


def f1(answer: str, reference: str) -> float:
    """``2·shared / (words of answer + words of reference)``, words counted as often as they occur.

    Words are what whitespace separates in lower case without ASCII punctuation; a, an and the do not count. If either has no words,
    1 if both have none, else 0 (as in SQuAD 2.0).
    """
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((ours & theirs).values()) / (sum(ours.values()) + sum(theirs.values()))


def words(text: str) -> Counter[str]:
    """How often each word occurs, see ``f1``."""
    return Counter(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())
