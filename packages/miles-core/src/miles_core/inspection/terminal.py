"""Trajectories in the terminal: a list, its groups, one in full. Text of a model is untrusted: none of it can command the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from rich.console import Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..sample import Sample
from .facts import Facts
from .groups import GroupFacts
from .tokens import RATIO, Stretch, doc_of, intensities, quantities, stretches, why_nothing

HIGH, LOW = (120, 190, 255), (255, 170, 110)
"""Backgrounds of what is full: +1 and −1."""


def listing(facts: Sequence[Facts]) -> Table:
    """One line a trajectory."""
    has_parts = any(parts(f.rewards) for f in facts)
    names = [
        "trajectory",
        "prompt",
        "group",
        "reward",
        *(["parts"] if has_parts else []),
        "status",
        "turns",
        "tokens",
        "trained",
        "version",
    ]
    table = _table(*names)
    for f in facts:
        table.add_row(
            f.address,
            _cell(f.prompt or f.prompt_id),
            _cell(f"{f.group}/t{f.trajectory}" + (f".b{f.branch}" if f.branch else "") + (f"@{f.attempt}" if f.attempt else "")),
            _number(f.reward),
            *([_cell(parts(f.rewards))] if has_parts else []),
            f.status,
            *map(str, (f.turns, f.length, f.trained)),
            _versions(f),
        )
    return table


def group_listing(groups: Sequence[GroupFacts]) -> Table:
    """One line a group."""
    table = _table("first", "step", "of", "prompt", "group", "size", "reward", "least", "most", "std", "tokens", "status")
    for g in groups:
        status = ", ".join(f"{n} {s}" for s, n in g.statuses.items())
        numbers = map(_number, (g.mean, g.least, g.most, g.std))
        prompt = _cell(g.prompt or g.prompt_id)
        table.add_row(g.first, str(g.step), g.source, prompt, _cell(g.group), str(g.size), *numbers, f"{g.length:.0f}", status)
    return table


def whole(facts: Facts, sample: Sample, by: str, texts: list[str] | None) -> Group:
    """One trajectory: its facts, then turn after turn, each token coloured by one quantity.

    Args:
        facts: Of the sample.
        sample: The sample.
        by: The quantity, one of ``quantities(sample)``.
        texts: Of each token; ids are shown without.
    """
    values = quantities(sample)[by]
    strength = intensities(by, values, sample.loss_mask)
    head = Table.grid(padding=(0, 2))
    known = {
        "trajectory": f"{facts.address} · {sample.id}",
        "reward": f"{_number(facts.reward)} {parts(facts.rewards)}",
        "status": f"{facts.status}, {facts.length} tokens: {facts.sampled} sampled by version {_versions(facts)}, {facts.trained} trained",
        "label": "" if sample.label is None else one_line(str(sample.label), 200),
        "colour": f"{by}: {doc_of(by)}; {_spread(by, values, sample)}{why_nothing(by, sample)}",
    }
    for name, said in known.items():
        if said:
            head.add_row(Text(name, style="bold"), Text(visible(said)))
    parts_: list = [head]
    for stretch in stretches(sample):
        parts_ += [_title(stretch, values), _tokens(stretch, sample, strength, texts)]
    return Group(*parts_)


def visible(text: str) -> str:
    """The text with control, format and other unprintable characters spelled out, line ends aside."""
    return "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else f"⟨{ord(c):x}⟩" for c in text)


def one_line(text: str, width: int = 44) -> str:
    """The beginning of a text, on one line."""
    flat = " ".join(text[: 4 * width].split())
    return visible(flat if len(flat) <= width and len(text) <= 4 * width else flat[: width - 1] + "…")


def parts(rewards: dict[str, float]) -> str:
    """Named parts of a reward, if there is more than one."""
    return " ".join(f"{n}={v:.3g}" for n, v in rewards.items()) if len(rewards) > 1 else ""


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False)
    left, yielding = {"trajectory", "first", "of", "prompt", "group", "parts", "status"}, {"prompt": 12, "group": 8, "parts": 8}
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name not in yielding, min_width=yielding.get(name))
    return table


def _cell(text: str) -> Text:
    """Text of others: never markup, never more than its line; its column is the one that yields to a narrow terminal."""
    return Text(one_line(text), no_wrap=True, overflow="ellipsis")


def _title(stretch: Stretch, values: np.ndarray) -> Rule:
    what = _mean(values[stretch.start : stretch.end]) if stretch.kind == "sampled" else stretch.kind
    role = visible(stretch.role) or "between turns"
    title = Text(
        f"{role} · tokens {stretch.start} to {stretch.end - 1}{f' · {what}' if what else ''}",
        style="bold" if stretch.kind == "sampled" else "dim",
    )
    return Rule(title, align="left", style="dim")


def _tokens(stretch: Stretch, sample: Sample, strength: np.ndarray, texts: list[str] | None) -> Text:
    line = Text()
    for t in range(stretch.start, stretch.end):
        piece = visible(texts[t]) if texts is not None else f"{sample.tokens[t]} "
        line.append(piece, style=_style(float(strength[t]), sampled=bool(sample.versions[t] >= 0)))
    return line


def _style(strength: float, sampled: bool) -> str:
    own = "" if sampled else "italic "
    if abs(strength) < 0.04:
        return own + ("" if sampled else "dim")
    full = HIGH if strength > 0 else LOW
    mixed = ",".join(str(round(255 + (c - 255) * abs(strength))) for c in full)
    return f"{own}black on rgb({mixed})"


def _spread(by: str, values: np.ndarray, sample: Sample) -> str:
    there = values[sample.loss_mask] if sample.loss_mask.any() else values
    numbers = there[np.isfinite(there)].astype(np.float64)
    if not len(numbers):
        return "nothing recorded"
    low, high = ((f"1{v - 1:+.1e}" if by == RATIO else f"{v:.4g}") for v in (numbers.min(), numbers.max()))
    return f"{low} to {high}" + (" over trained tokens" if sample.loss_mask.any() else "")


def _mean(values: np.ndarray) -> str:
    numbers = values[np.isfinite(values)].astype(np.float64)
    return f"mean {numbers.mean():.4g}" if len(numbers) else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _versions(facts: Facts) -> str:
    if facts.newest < 0:
        return "–"
    return str(facts.newest) if facts.oldest == facts.newest else f"{facts.oldest}–{facts.newest}"
