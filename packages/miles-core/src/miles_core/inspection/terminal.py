"""Trajectories in the terminal: a list, its groups, one in full. Text of a model is untrusted: none of it can command the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len
from rich.console import Group
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..sample import Sample
from .facts import Facts
from .groups import GroupFacts
from .tokens import RATIO, Stretch, doc_of, intensities, quantities, stretches, why_nothing

Columns = dict[str, list[str] | list[Text]]
"""Cells by the column's name."""

LEAST = 10
"""Characters of a column that yields to a narrow terminal."""

HIGH, LOW = (120, 190, 255), (255, 170, 110)
"""Backgrounds of what is full: +1 and −1."""


def listing(facts: Sequence[Facts], width: int | None = None) -> Table:
    """One line a trajectory, in ``width`` characters if that is given."""
    columns: Columns = {
        "trajectory": [f.address for f in facts],
        "prompt": [_cell(f.prompt or f.prompt_id) for f in facts],
        "group": [
            _cell(f"{f.group}/t{f.trajectory}" + (f".b{f.branch}" if f.branch else "") + (f"@{f.attempt}" if f.attempt else ""))
            for f in facts
        ],
        "reward": [_number(f.reward) for f in facts],
        "parts": [_cell(parts(f.rewards)) for f in facts],
        "status": [f.status for f in facts],
        "turns": [str(f.turns) for f in facts],
        "tokens": [str(f.length) for f in facts],
        "trained": [str(f.trained) for f in facts],
        "version": [_versions(f) for f in facts],
    }
    if not any(cell.plain for cell in columns["parts"] if isinstance(cell, Text)):
        del columns["parts"]
    return _table(columns, width, less_needed=("group", "turns", "version", "trained", "parts"))


def group_listing(groups: Sequence[GroupFacts], width: int | None = None) -> Table:
    """One line a group, in ``width`` characters if that is given."""
    columns: Columns = {
        "first": [g.first for g in groups],
        "step": [str(g.step) for g in groups],
        "of": [g.source for g in groups],
        "prompt": [_cell(g.prompt or g.prompt_id) for g in groups],
        "group": [_cell(g.group) for g in groups],
        "size": [str(g.size) for g in groups],
        "reward": [_number(g.mean) for g in groups],
        "least": [_number(g.least) for g in groups],
        "most": [_number(g.most) for g in groups],
        "std": [_number(g.std) for g in groups],
        "tokens": [f"{g.length:.0f}" for g in groups],
        "status": [", ".join(f"{n} {s}" for s, n in g.statuses.items()) for g in groups],
    }
    return _table(columns, width, less_needed=("of", "step", "group", "status", "tokens", "std", "size"))  # the address says the first two


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


def _table(columns: Columns, width: int | None, less_needed: Sequence[str]) -> Table:
    """Columns side by side; of those less needed, the first are left out, as many as it takes to fit."""
    left, yielding = {"trajectory", "first", "of", "prompt", "group", "parts", "status"}, {"prompt", "group", "parts"}
    needed = {n: 2 + max(cell_len(n), LEAST if n in yielding else max(map(_length, cells), default=0)) for n, cells in columns.items()}
    for name in less_needed:
        if width is not None and sum(needed.values()) - 2 > width:
            needed.pop(name, None)
    table = Table(box=None, pad_edge=False)
    for name in needed:
        table.add_column(
            name, justify="left" if name in left else "right", no_wrap=name not in yielding, min_width=LEAST if name in yielding else None
        )
    for row in zip(*(columns[name] for name in needed), strict=True):
        table.add_row(*row)
    return table


def _length(cell: str | Text) -> int:
    return cell.cell_len if isinstance(cell, Text) else cell_len(cell)


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
