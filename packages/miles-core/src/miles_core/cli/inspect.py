"""``miles inspect``: what the command does with what is found."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from ..config import RunConfig
from ..errors import ConfigError, DataError, MilesError
from ..inspection.facts import Facts, TrajectoryFile, files_of_steps, sample_at
from ..inspection.groups import group_of, grouped
from ..inspection.plain import finite
from ..inspection.selection import Selection
from ..inspection.terminal import group_listing, listing, whole
from ..inspection.tokens import Vocabulary, quantities, stretches
from ..plugin_finding import did_you_mean
from ..run_dir import RunDir
from ..sample import Sample
from .screen import console, errors, print_wide, width


def show_list(run: RunDir, selection: Selection, limit: int, groups: bool, as_json: bool) -> None:
    """Trajectories or groups, the newest steps' last; the newest ``limit`` of them, or all for machines."""
    seen = Seen(selection, files_of_steps(run, selection.steps), whole_groups=groups)
    if groups:
        found = grouped(seen)
        if as_json:
            return _print_lines(found)
        print_wide(group_listing(found[-limit:], width()))
        return seen.report(len(found), min(limit, len(found)), "groups")
    if as_json:
        return _print_lines(seen)
    newest = deque(seen, maxlen=limit)
    print_wide(listing(newest, width()))
    seen.report(seen.matching, len(newest), "trajectories")
    if newest:
        console.print(f"[dim]One in full: miles inspect {escape(str(run.path))} {newest[-1].address}[/]", soft_wrap=True)


def show_one(run: RunDir, address: str, by: str, as_json: bool) -> None:
    """One trajectory in full."""
    declare_columns(run)
    facts, sample = sample_at(run, address)
    vocabulary = Vocabulary(run, facts.policy)
    texts = vocabulary.texts(sample.tokens)
    if as_json:
        print(json.dumps(finite(everything(facts, sample, texts)), indent=1, allow_nan=False))
        return
    if by not in (known := quantities(sample)):
        raise ConfigError(_not_recorded(by, list(known), facts.address))
    console.print(whole(facts, sample, by, texts))
    if vocabulary.lacking:
        console.print(f"[yellow]note[/] {escape(vocabulary.lacking)}")


def check_together(trajectory: str | None, html: Path | None, chosen: Mapping[str, Any], as_json: bool) -> None:
    """Raise ConfigError for options of which one would go without effect."""
    set_ = [option for option, value in chosen.items() if value]
    if trajectory is not None and (in_vain := set_ + (["--html"] if html is not None else [])):
        raise ConfigError(f"{trajectory!r} names one trajectory; {in_vain[0]} is for lists. Leave one of the two out.")
    if html is not None and (in_vain := [o for o in set_ if o == "--groups"] + (["--json"] if as_json else [])):
        raise ConfigError(f"--html writes a page, which has its own view of groups; leave {in_vain[0]} out")


class Seen:
    """The chosen trajectories, file by file: what matches is given on, a file that is damaged is named and passed over.

    With ``whole_groups`` what matches is given on with the others of its group, so that the group's numbers are the whole group's.
    """

    def __init__(self, selection: Selection, files: list[TrajectoryFile], whole_groups: bool):
        self.selection, self.files, self.whole_groups = selection, files, whole_groups
        self.total = self.matching = 0

    def __iter__(self) -> Iterator[Facts]:
        for file in self.files:
            try:
                facts = file.facts()
            except DataError as error:
                warn(error)
                continue
            self.total += len(facts)
            chosen = [one for one in facts if self.selection.holds(one)]
            self.matching += len(chosen)
            if self.whole_groups:
                groups = {group_of(one) for one in chosen}
                chosen = [one for one in facts if group_of(one) in groups]
            yield from chosen

    def report(self, found: int, shown: int, what: str) -> None:
        """How many there are."""
        said = f"{found:,} {what}" if found == shown else f"the last {shown:,} of {found:,} {what} (--limit)"
        among = "" if self.matching == self.total else f", chosen among {self.total:,} trajectories"
        console.print(f"[dim]{said}{among}[/]")


def warn(error: MilesError) -> None:
    """A sentence on standard error; the command goes on."""
    errors.print(f"[yellow]passed over[/] {escape(str(error))}", soft_wrap=True)


def declare_columns(run: RunDir) -> None:
    """Import the run's plug-ins, since they may have declared columns; where that fails, their columns will be what is missing."""
    try:
        RunConfig.from_resolved(run.config)
    except MilesError as error:
        errors.print(f"[yellow]note[/] the plug-ins of {run.config} are not known here: {escape(str(error))}", soft_wrap=True)


def everything(facts: Facts, sample: Sample, texts: list[str] | None) -> dict[str, Any]:
    """A trajectory for machines."""
    numbers = {name: values.tolist() for name, values in quantities(sample).items()}
    return facts._asdict() | {
        "label": sample.label,
        "metadata": sample.metadata,
        "timings": sample.timings,
        "spoken": [s.__dict__ for s in stretches(sample)],
        "tokens": sample.tokens.tolist(),
        "texts": texts,
        "columns": numbers,
    }


def _print_lines(found: Iterable[Any]) -> None:
    for one in found:
        print(json.dumps(finite(one._asdict()), allow_nan=False))


def _not_recorded(by: str, known: list[str], address: str) -> str:
    if by == "ratio":
        return (
            f"trajectory {address} has no ratio: it has no old_logprobs. They are recorded where a step trained it (trainer torch: if the "
            "step is one optimizer step, or a loss has old: recompute), not of evaluations. "
            f"It has {', '.join(known)}."
        )
    return f"trajectory {address} has no {by!r} of its tokens.{did_you_mean(by, known)} It has {', '.join(known)}."


def write_html(run: RunDir, selection: Selection, file: Path, tokens: int) -> None:
    """Write the page and say what is in it."""
    from ..inspection.page import write_page

    declare_columns(run)
    seen = Seen(selection, files_of_steps(run, selection.steps), whole_groups=True)
    said = write_page(run, seen, seen.files, file, tokens, warn, "" if selection.rewards is None else str(selection.rewards))
    console.print(escape(said), soft_wrap=True)
