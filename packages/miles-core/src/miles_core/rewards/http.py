"""``reward: http``: a service of your own scores, at a URL.

One request a sample is a POST of::

    {"id": "policy/e0-rows.jsonl:3/t2.b0@0", "prompt": …, "response": "…", "label": …, "status": "completed", "metadata": {…}}

``prompt``, ``label`` and ``metadata`` are the sample's (metadata without the response), ``response`` is the text after the prompt without
the end of text at its end. With ``tokens: true`` there are also ``tokens`` (ids of prompt and response) and ``sampled`` (for each token,
whether the policy sampled it). The answer is a number, or ``{"reward": number, "parts": {name: number}}``. With ``per: group`` or
``batch`` the request is ``{"samples": [ … ]}``, and the answer a list with one of these for each.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from ..errors import DataError
from ..protocols import BuildContext, Score
from ..sample import Sample
from .endpoint import EXCERPT, Endpoint, EndpointConfig, Url
from .texts import ends_of_text, response_of


class Http(EndpointConfig):
    """Options of ``reward: http``."""

    target: ClassVar[str] = "miles_core.rewards.http:HttpReward"

    url: Url
    """Where to POST."""
    per: Literal["sample", "group", "batch"] = "sample"
    """What one request holds."""
    tokens: bool = False
    """Whether token ids are sent as well."""

    def called_with(self) -> str:
        """What a request holds."""
        return self.per


class HttpReward:
    """Asks the service; see the module for what is sent and what may come back."""

    def __init__(self, config: Http, context: BuildContext):
        self.config, self._ends = config, ends_of_text(context)
        self._service = Endpoint(config, config.url)

    async def __call__(self, given: Sample | list[Sample]) -> Score | list[Score]:
        """The service's score of a sample, or of each of a group or batch.

        Raises:
            InfrastructureFailure: The service gave no answer, however often it was asked.
            ConfigError: It does not take the key, or is not there.
            DataError: It refuses the request, or answers something else than was expected.
        """
        if isinstance(given, Sample):
            subject = f"reward http of sample {given.id}"
            return self._score(await self._service.ask(self._told(given), subject), subject)
        subject = f"reward http of sample {given[0].id}" + (f" and {len(given) - 1} more" if len(given) > 1 else "")
        answers = await self._service.ask({"samples": [self._told(sample) for sample in given]}, subject)
        if not isinstance(answers, list) or len(answers) != len(given):
            found = f"a list of {len(answers)}" if isinstance(answers, list) else self._service.without_key(repr(answers))[:EXCERPT]
            raise DataError(
                f"{subject}: {self.config.url} answered {found}; expected a list with a reward for each of {len(given)} samples"
            )
        return [self._score(answer, f"reward http of sample {s.id}") for answer, s in zip(answers, given, strict=True)]

    def _told(self, sample: Sample) -> dict[str, Any]:
        """What a service gets of a sample."""
        told = {
            "id": str(sample.id),
            "prompt": sample.prompt,
            "response": response_of(sample, self._ends, "http"),
            "label": sample.label,
            "status": str(sample.status),
            "metadata": {name: value for name, value in sample.metadata.items() if name != "response"},
        }
        return told | ({"tokens": sample.tokens.tolist(), "sampled": (sample.versions >= 0).tolist()} if self.config.tokens else {})

    def _score(self, answer: Any, subject: str) -> Score:
        if isinstance(answer, dict) and set(answer) <= {"reward", "parts"} and "reward" in answer:
            reward, parts = answer["reward"], answer.get("parts", {})
        else:
            reward, parts = answer, {}
        if not _is_number(reward) or not isinstance(parts, dict) or not all(_is_number(value) for value in parts.values()):
            raise DataError(
                f"{subject}: {self.config.url} answered {self._service.without_key(repr(answer))[:EXCERPT]}; "
                'expected a finite number, or {"reward": number, "parts": {name: number}}'
            )
        return Score(float(reward), {name: float(value) for name, value in parts.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
