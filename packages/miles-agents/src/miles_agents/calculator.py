"""``environment: calculator``: a sum, a calculator to call, and one point for the right answer.

A trajectory, what the environment injects in brackets::

    [47 + 58 - 12 ?] <call> 47 + 58 </call>[ <res> 105 </res>] <call> 105 - 12 </call>[ <res> 93 </res>] ans 93<eos>

Each text is written with the ``WORDS`` below, so that a tiny model needs some twenty tokens and every number is spelt digit by digit.
"""

from __future__ import annotations

import re

from miles_core.errors import DataError
from miles_core.protocols import Observation, Prompt

from .arithmetic import evaluate, written

WORDS = (*"0123456789", " + ", " - ", "-", " ?", " <call> ", " </call>", " <res> ", " </res>", " ans ", "error")
"""Words for ``tokenizer: {kind: words, words: …}``, all that prompts, calls and results are written with."""

CALL = re.compile(r"<call>([^<>]*)</call>\s*$")
ANSWER = re.compile(r"\s*ans (-?\d{1,20})\s*(<[^<> ]+>)?\s*")  # the end-of-text token may follow


class Calculator:
    """Answers ``<call> 47 + 58 </call>`` with the result, or ``error``; done at ``ans`` and a number: 1.0 if it is the label, else 0.0.

    Anything else earns nothing; it ends where the policy ends its text or is cut.
    """

    stop = ("</call>",)

    async def reset(self, prompt: Prompt) -> Observation:
        """The problem. Its label is the answer, a whole number. Raises DataError where it has none."""
        try:
            self._answer = int(prompt.label)
        except (TypeError, ValueError):
            raise DataError(
                f"prompt {prompt.id}: its label is {prompt.label!r}; the environment calculator compares answers with a whole number "
                "(label_field of the data)"
            ) from None
        return Observation(prompt.text, stop=self.stop)

    async def step(self, action: str) -> Observation:
        """The result of a call, or the reward of an answer."""
        if "</call>" in action:
            return Observation(f" <res> {_result(action)} </res>", stop=self.stop)
        answer = ANSWER.fullmatch(action)
        return Observation(done=answer is not None, reward=float(answer is not None and int(answer[1]) == self._answer), stop=self.stop)


def _result(action: str) -> str:
    call = CALL.search(action)
    try:
        return written(evaluate(call[1])) if call else "error"
    except ValueError:
        return "error"
