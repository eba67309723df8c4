"""One trajectory token by token: texts, who spoke, and every number that was recorded of a token. The table of columns drives it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..columns import COLUMNS
from ..errors import ConfigError
from ..lora import base_of, is_adapter
from ..run_dir import RunDir
from ..sample import Sample
from ..tokenizers import load_tokenizer

Scale = Literal["flag", "version", "logprob", "ratio", "signed"]
RATIO = "ratio"
RATIO_DOC = (
    "exp(old_logprobs − logprobs): the token under the weights before the step, over the rollout's; not known of samples that a step was "
    "taken without, since their advantage is 0"
)
UNFINISHED = ".partial"
"""At the end of the name of a directory that is being written."""
LEAST_LOGPROB, CLIP = -5.0, 0.2
"""Where colours are full: of log-probabilities, of a ratio's distance from 1. Other numbers are scaled by the largest of the trajectory."""


@dataclass(frozen=True)
class Stretch:
    """Tokens ``start`` to ``end`` (exclusive) of one turn. ``kind``: ``prompt`` before anything was sampled, ``sampled`` if the policy
    spoke in it, else ``injected``."""

    role: str
    start: int
    end: int
    kind: Literal["prompt", "sampled", "injected"]


def quantities(sample: Sample) -> dict[str, np.ndarray]:
    """Every number that was recorded of each token, [T] by column name, and ``ratio`` where ``old_logprobs`` are there (float64; NaN
    where one of the two is not).
    """
    found = {}
    for name, spec in COLUMNS.items():
        column = sample.columns.get(name)
        if name != "tokens" and spec.kind == "token" and isinstance(column, np.ndarray) and column.ndim == 1:
            found[name] = column
    if "old_logprobs" in found:
        found[RATIO] = np.exp(log_ratio(sample).astype(np.float64))
    return found


def log_ratio(sample: Sample) -> np.ndarray:
    """float32 [T]: ``old_logprobs − logprobs``, NaN where one of the two is not recorded."""
    old = sample.columns["old_logprobs"]
    assert isinstance(old, np.ndarray)
    return (old.astype(np.float64) - sample.logprobs).astype(np.float32)


def why_nothing(name: str, sample: Sample) -> str:
    """Why a quantity that was recorded of others says nothing of any trained token here; empty if it does, or nobody can tell."""
    values, trained = quantities(sample)[name].astype(np.float64), sample.loss_mask
    advantages = sample.columns.get("advantages")
    known = np.isfinite(values[trained]).any() or not trained.any()
    if known or not isinstance(advantages, np.ndarray) or advantages[trained].any():
        return ""
    return "; its advantage is 0, so the step was taken without it (skip_zero_advantages), and nothing was computed of its tokens"


def doc_of(name: str) -> str:
    """What a quantity means."""
    return RATIO_DOC if name == RATIO else COLUMNS[name].doc


def scale_of(name: str) -> Scale:
    """How a quantity is coloured."""
    if name == RATIO:
        return "ratio"
    if COLUMNS[name].dtypes[0] == "bool":
        return "flag"
    if name == "versions":
        return "version"
    return "logprob" if name.endswith("logprobs") else "signed"


def intensities(name: str, values: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """float [T] in [−1, 1]: how strongly to colour each token; 0 where nothing is recorded, and of what only training looks at (ratio,
    advantages, returns …) where the token is not trained.
    """
    scale = scale_of(name)
    numbers = values.astype(np.float64)
    if scale == "version":  # how old, among the versions of this trajectory
        span = max(1.0, numbers.max() - numbers[numbers >= 0].min()) if (numbers >= 0).any() else 1.0
        numbers = np.where(numbers >= 0, 0.25 + 0.75 * (numbers.max() - numbers) / span, 0.0)
    elif scale == "logprob":
        numbers = numbers / LEAST_LOGPROB
    elif scale == "ratio":
        numbers = (numbers - 1) / CLIP
    elif scale == "signed":
        finite = np.abs(numbers[np.isfinite(numbers) & trained])
        numbers = numbers / (finite.max() if finite.any() else 1.0)
    if scale in ("ratio", "signed"):
        numbers = np.where(trained, numbers, 0.0)
    return np.clip(np.nan_to_num(numbers), -1, 1)


def stretches(sample: Sample) -> list[Stretch]:
    """The turns in order, and what lies between them as a turn of nobody."""
    out: list[Stretch] = []
    end = 0
    for role, start, stop in [*((t.role, t.start, t.end) for t in sample.turns), ("", len(sample), len(sample))]:
        if start > end:
            out.append(_stretch(sample, "", end, start))
        if stop > start:
            out.append(_stretch(sample, role, start, stop))
        end = max(end, stop)
    return out


def _stretch(sample: Sample, role: str, start: int, end: int) -> Stretch:
    sampled = sample.versions >= 0
    kind = "sampled" if sampled[start:end].any() else "injected" if sampled[:start].any() else "prompt"
    return Stretch(role, start, end, kind)


class Vocabulary:
    """Texts of token ids; ``texts`` is empty-handed (None) where no tokenizer can be had, and ``lacking`` says why."""

    def __init__(self, run: RunDir, policy: str):
        self.lacking: str | None = None
        self._known: dict[int, str] = {}
        self._tokenizer: Any = None
        directory = tokenizer_directory(run, policy)
        if directory is None:
            self.lacking = f"no tokenizer of {policy!r} lies in {run.models}; token ids are shown"
        elif not find_spec("tokenizers"):
            self.lacking = "token ids are shown; texts need pip install 'miles-core[data]'"
        else:
            self._tokenizer = _load(directory)

    def texts(self, ids: Iterable[int]) -> list[str] | None:
        """The text of each token on its own; a part of a character is shown as �."""
        if self._tokenizer is None:
            return None
        return [self._known[i] if i in self._known else self._known.setdefault(i, self._text(i)) for i in map(int, ids)]

    def _text(self, token: int) -> str:
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        name = self._tokenizer.id_to_token(token) if hasattr(self._tokenizer, "id_to_token") else None
        return f" {text}" if name and name.startswith("▁") and not text.startswith(" ") else text  # decoders strip a first space


def tokenizer_directory(run: RunDir, policy: str) -> Path | None:
    """Where the policy's tokenizer lies: in the run, or where its configuration says the model came from."""
    own = sorted(p for p in run.models.glob(f"*/{policy}/tokenizer_config.json") if not p.parts[-3].endswith(UNFINISHED))
    if own:
        return own[0].parent
    given = [m.get("path") for s in run_config(run).get("stages", {}).values() for n, m in s.get("models", {}).items() if n == policy]
    directories = [d for p in given if p for d in (Path(p), *([Path(base_of(Path(p)))] if is_adapter(Path(p)) else []))]
    return next((d for d in directories if (d / "tokenizer_config.json").is_file()), None)


def run_config(run: RunDir) -> dict[str, Any]:
    """``config.yaml`` as plain data, whatever version of Miles wrote it. Raises ConfigError if it is no mapping."""
    import yaml

    try:
        data = yaml.safe_load(run.config.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{run.config} cannot be read ({error}). Restore it from a copy.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{run.config} holds a {type(data).__name__}; a run's configuration is a mapping")
    return data


def _load(directory: Path) -> Any:
    whole = directory / "tokenizer.json"
    if whole.is_file():  # transformers would take a second and add nothing here
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(whole))
    return load_tokenizer(directory)
