"""``reward: judge``: a language model behind an OpenAI-compatible endpoint reads the response and says a score.

The texts are put into the template as they are, once: braces in them are not read again. But a response is what the policy wrote, and a
policy is paid for what the judge says: it may learn to talk to the judge (docs/rewards.md says what helps).
"""

from __future__ import annotations

import math
from string import Formatter
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from ..data import local_path
from ..errors import ConfigError, DataError, MilesError, RunError
from ..plugin_finding import did_you_mean
from ..protocols import BuildContext, Score
from ..sample import Sample
from ..waiting import in_daemon_thread
from .endpoint import EXCERPT, Endpoint, EndpointConfig, Url
from .patterns import ExtractorText, extract
from .texts import as_text, ends_of_text, response_of

FIELDS = ("prompt", "response", "label")
"""What a template may name."""
OWN = ("model", "messages", "stream")
"""Fields of a request that the reward sets, or that would change what comes back."""


def template_problem(template: str) -> str | None:
    """What is wrong with a template, as a sentence without its beginning; None if nothing is."""
    try:
        pieces = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"cannot be read ({error}); a literal brace is doubled: {{{{ and }}}}"
    for name, spec, conversion in pieces:
        if name not in FIELDS or spec or conversion:
            hint = did_you_mean(name, list(FIELDS))
            return f"names {{{name}}}.{hint} It may name {{prompt}}, {{response}}, {{label}}; a literal brace is doubled"
    return None if any(name == "response" for name, *_ in pieces) else "does not name {response}, so the judge would not see it; put it in"


def _fillable(template: str) -> str:
    if problem := template_problem(template):
        raise ValueError(f"the template {problem}")
    return template


class Judge(EndpointConfig):
    """Options of ``reward: judge``. ``attempts`` bounds also how often it is asked again because its answer had no score."""

    target: ClassVar[str] = "miles_core.rewards.judge:JudgeReward"

    base_url: Url
    """Of the API: ``/chat/completions`` is added (``https://api.openai.com/v1``, ``http://127.0.0.1:30000/v1``)."""
    model: str
    """What the service calls the model."""
    template: Annotated[str, AfterValidator(_fillable)] | None = None
    """The user message, with ``{prompt}``, ``{response}`` and ``{label}`` in it; a literal brace is doubled."""
    template_file: str | None = None
    """Or: a file with it; ``~`` and ``${VARIABLE}`` are expanded."""
    score: ExtractorText = r"(?i)\bscore[\s*_:=]*(-?\d+(?:\.\d+)?)(?!\.?\d|\w)"
    """A regular expression whose one group is the score; its last match in the answer counts. The default finds 7 in ``**Score:** 7``."""
    score_range: tuple[float, float]
    """Worst and best score: they become 0 and 1, what lies between a straight line, what lies outside is no score."""
    request: dict[str, Any] = Field(default_factory=dict)
    """More fields of the request: temperature, max_tokens, …"""
    unscored: float | None = Field(None, allow_inf_nan=False)
    """Reward where no answer of ``attempts`` has a score. None: the run stops."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.template is None) == (self.template_file is None):
            raise ValueError("give template or template_file, one of them")
        if self.score_range[0] == self.score_range[1] or not all(map(math.isfinite, self.score_range)):
            raise ValueError(f"score_range is {list(self.score_range)}; give the worst and the best score, e.g. [1, 10]")
        if taken := sorted(set(OWN) & set(self.request)):
            raise ValueError(f"request sets {', '.join(taken)}, which the reward does itself; take it out")
        return self

    def problems(self, stage: Any) -> list[str]:
        """The template's file is there and can be filled."""
        try:
            read_template(self)
        except MilesError as error:
            return [str(error)]
        return []


def read_template(config: Judge) -> str:
    """The template, from its file if it has one. Raises ConfigError when there is none, or it cannot be filled."""
    if config.template is not None:
        return config.template
    path = local_path(str(config.template_file), "reward judge: template_file")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"reward judge: template_file {path} cannot be read ({error}); correct the path or put the template there"
        ) from None
    if problem := template_problem(template):
        raise ConfigError(f"reward judge: the template in {path} {problem}")
    return template


class JudgeReward:
    """Asks the judge about one sample; its reward is from 0 to 1, and its part ``unscored`` counts answers without a score."""

    def __init__(self, config: Judge, context: BuildContext):
        self.config, self._ends, self._template = config, ends_of_text(context), read_template(config)
        self._service = Endpoint(config, f"{config.base_url.rstrip('/')}/chat/completions")
        self._names_label = any(name == "label" for _, name, _, _ in Formatter().parse(self._template))

    async def __call__(self, sample: Sample) -> Score:
        """The judge's score.

        Raises:
            InfrastructureFailure: The service gave no answer, however often it was asked.
            ConfigError: It does not take the key, or is not there.
            DataError: The sample lacks what the template names, the service refuses the request, or its answer is no chat completion.
            RunError: No answer had a score, and ``unscored`` is not given.
        """
        config, subject = self.config, f"reward judge of sample {sample.id}"
        messages = [{"role": "user", "content": self._message(sample)}]
        said = ""
        for unscored in range(config.attempts):
            said = self._text(await self._service.ask({**config.request, "model": config.model, "messages": messages}, subject), subject)
            number = await in_daemon_thread(extract, config.score, said, config.timeout_s, subject)
            if (reward := self._reward(number)) is not None:
                return Score(reward, {"unscored": unscored})
        if config.unscored is not None:
            return Score(config.unscored, {"unscored": config.attempts})
        worst, best = config.score_range
        raise RunError(
            f"{subject}: {config.model} at {self._service.url} gave no score from {worst:g} to {best:g} in {config.attempts} answers; the "
            f"last ends {self._service.without_key(said)[-EXCERPT:]!r}. Mend the template or the pattern in score, or say in unscored what "
            "such a sample is worth"
        )

    def _message(self, sample: Sample) -> str:
        if self._names_label and sample.label is None:
            raise DataError(f"sample {sample.id} has no label, which the template of reward judge names; take it out of the template")
        response = response_of(sample, self._ends, "judge")
        return self._template.format(prompt=as_text(sample.prompt), response=response, label=as_text(sample.label))

    def _text(self, answer: Any, subject: str) -> str:
        """What the model said in a chat completion; "" for nothing."""
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = 0
        if not isinstance(content, str | None):
            found = self._service.without_key(repr(answer))[:EXCERPT]
            raise DataError(f"{subject}: {self._service.url} answered no chat completion: {found}; is base_url right?")
        return content or ""

    def _reward(self, number: str | None) -> float | None:
        """From 0 to 1; None for what is no score."""
        worst, best = self.config.score_range
        try:
            reward = (float(number or "") - worst) / (best - worst)
        except ValueError:
            return None
        return reward if 0 <= reward <= 1 else None
