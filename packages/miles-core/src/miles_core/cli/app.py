"""The commands. Each reads its arguments, calls the library and prints; errors of Miles become sentences and exit code 1."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ..config import RunConfig, resolve
from ..errors import MilesError
from ..run_dir import RunDir
from ..runner import Outcome
from . import complete
from .screen import console, errors, print_wide

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(help="A bundled recipe's name (see `miles recipes`) or a YAML file.", autocompletion=complete.recipes)
]
RunArgument = Annotated[Path, typer.Argument(help="The run's directory.", autocompletion=complete.runs)]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. seed=3 or model.trainer.lr=1e-4")]
JsonOption = Annotated[bool, typer.Option("--json", help="For machines.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"miles {metadata.version('miles-core')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version of Miles.")] = False,
) -> None:
    """Post-train language models with reinforcement learning."""


@app.command()
def run(recipe: RecipeArgument, overrides: OverridesArgument = None, json_: JsonOption = False) -> None:
    """Start a run."""
    _drive(resolve(recipe, overrides), None, json_)


@app.command()
def resume(run_dir: RunArgument, json_: JsonOption = False) -> None:
    """Go on with a run from its newest complete cut."""
    directory = RunDir.open(run_dir)
    _drive(RunConfig.from_resolved(directory.config), directory, json_)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    load: Annotated[
        bool, typer.Option("--load", help="Also build every part of the first stage (imports torch, loads the model).")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Resolve and validate a recipe, and show what it would do. Needs no torch."""
    from ..check import check as check_config
    from ..check import missing
    from .show import plan

    config = resolve(recipe, overrides)
    check_config(config)
    if load:
        from .build import build_once

        asyncio.run(build_once(config))
    if json_:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
    else:
        print_wide(plan(config))
        for sentence in missing(config):
            console.print(f"[yellow]not on this machine[/] {escape(sentence)}", soft_wrap=True)
        console.print("[green]ok[/] " + ("everything was built" if load else "nothing was built; --load does"))


@app.command()
def inspect(
    run_dir: RunArgument,
    trajectory: Annotated[str | None, typer.Argument(help="Show this one in full: its address, as the list gives it.")] = None,
    step: Annotated[str | None, typer.Option(help="Only these steps: 5, or 5..10.")] = None,
    reward: Annotated[str | None, typer.Option(help="Only these rewards: 1, or 0..0.5.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Only this prompt: its id, or a part of its text.")] = None,
    groups: Annotated[bool, typer.Option("--groups", help="One line a group.")] = False,
    by: Annotated[
        str, typer.Option(help="Colour of the tokens: logprobs, advantages, ratio, loss_mask, versions, or another column.")
    ] = "logprobs",
    limit: Annotated[int, typer.Option(min=1, help="Most lines of a list.")] = 40,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page to look through in a browser.")] = None,
    html_tokens: Annotated[int, typer.Option(min=0, help="Most tokens that the page holds with all their values.")] = 2_000_000,
    json_: JsonOption = False,
) -> None:
    """Look at trajectories: a list, groups, one in full, or a page. Works on a run that goes on."""
    from ..inspection.selection import Range, Selection
    from . import inspect as view

    run = RunDir.open(run_dir)
    chosen = {"--step": step, "--reward": reward, "--prompt": prompt, "--groups": groups}
    view.check_together(trajectory, html, chosen, json_)
    selection = Selection(Range.parse(step, "--step"), Range.parse(reward, "--reward"), prompt)
    if html is not None:
        view.write_html(run, selection, html, html_tokens)
    elif trajectory is not None:
        view.show_one(run, trajectory, by, json_)
    else:
        view.show_list(run, selection, limit, groups, json_)


@app.command()
def export(
    run_dir: RunArgument,
    directory: Annotated[Path, typer.Argument(help="Where to write the model; it must not exist.")],
    step: Annotated[int | None, typer.Option(help="Step of the run; the end, or the newest checkpoint, by default.")] = None,
    model: Annotated[str | None, typer.Option(help="The policy, where there are several.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add an adapter (lora) to its model's weights.")] = False,
    json_: JsonOption = False,
) -> None:
    """Write a policy as a Hugging Face directory (of one with lora: a PEFT directory) with its tokenizer and a model card."""
    from ..inspection.export import export as write

    source = write(RunDir.open(run_dir), directory, step, model, merge)
    if json_:
        said = {"directory": str(directory), "step": source.step, "stage": source.stage, "from": str(source.directory)}
        print(json.dumps(said))
    else:
        origin = "the end of the run" if source.finished else f"checkpoint {source.directory.name}"
        console.print(escape(f"{directory}: weights after step {source.step} ({origin}); the facts are in its README.md"), soft_wrap=True)


@app.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="The runs' directories.", autocompletion=complete.runs)],
    metrics: Annotated[str | None, typer.Option(help="Which: reward,eval/ (a name with / at its end: all below it).")] = None,
    at: Annotated[str | None, typer.Option(help="Also the values at these steps: 10,20.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the metrics into this PNG file.")] = None,
    json_: JsonOption = False,
) -> None:
    """Put the metrics of runs side by side, and say what their configurations do not have in common."""
    from .compare import compare as put_side_by_side

    put_side_by_side(run_dirs, metrics, at, plot, json_)


@app.command()
def recipes(json_: JsonOption = False) -> None:
    """List the bundled recipes."""
    from ..recipe import bundled_recipes
    from .show import first_comment

    found = {name: first_comment(path) for name, path in bundled_recipes().items()}
    if json_:
        print(json.dumps(found, indent=2))
        return
    table = Table("recipe", "what it does", box=None)
    for name, comment in found.items():
        table.add_row(f"[bold]{name}[/]", escape(comment))
    print_wide(table)


@app.command()
def plugins(
    point: Annotated[str | None, typer.Argument(help="Only this plug-point.", autocompletion=complete.points)] = None,
    json_: JsonOption = False,
) -> None:
    """List every plug-in and where it comes from."""
    from ..errors import PluginError
    from ..plugin_finding import did_you_mean, find_all
    from ..plugins import POINTS

    if point is not None and point not in POINTS:
        raise PluginError(f"no plug-point is called {point!r}.{did_you_mean(point, list(POINTS))} Points: {', '.join(POINTS)}")
    found = {p: find_all(p) for p in ([point] if point else POINTS)}
    if json_:
        print(json.dumps({p: {n: f.origin for n, f in sorted(fs.items())} for p, fs in found.items()}, indent=2))
        return
    table = Table("point", "plug-in", "from", box=None)
    for name, plug_ins in found.items():
        table.add_row(f"[bold]{name}[/]", "", f"[dim]{POINTS[name].doc}[/]")
        for plug_in, entry in sorted(plug_ins.items()):
            table.add_row("", plug_in, escape(entry.origin))
    print_wide(table)


@app.command()
def doctor(json_: JsonOption = False) -> None:
    """Say what this machine and installation can do, and what is missing for what."""
    from .doctor import examine

    findings = examine()
    if json_:
        print(json.dumps([f.__dict__ for f in findings], indent=2))
    else:
        table = Table("", "what", "found", box=None)
        for f in findings:
            table.add_row({"ok": "[green]ok[/]", "missing": "[yellow]–[/]", "bad": "[red]!![/]"}[f.state], f.what, escape(f.found))
        print_wide(table)
    if any(f.state == "bad" for f in findings):
        raise typer.Exit(1)


def _drive(config: RunConfig, directory: RunDir | None, as_json: bool) -> None:
    """Run or resume, and report the end."""
    from .drive import drive

    outcome = drive(config, directory, as_json)
    if as_json:
        print(json.dumps({"run_dir": str(outcome.run_dir), "steps": outcome.steps, "finished": outcome.finished}))
    else:
        _report(outcome)
    if not outcome.finished:
        raise typer.Exit(130)


def _report(outcome: Outcome) -> None:
    from .ending import ending

    if outcome.finished:
        for part in ending(RunDir(outcome.run_dir)):
            console.print(part, soft_wrap=isinstance(part, str))
    else:
        there = escape(str(outcome.run_dir))
        console.print(f"Stopped after step {outcome.steps}; everything is saved. Go on with: [bold]miles resume {there}[/]", soft_wrap=True)


@functools.cache
def add_commands_of_packages() -> None:
    """Groups of commands that installed packages bring (entry points ``miles.command``, each a typer app); once a process."""
    for entry in metadata.entry_points(group="miles.command"):
        app.add_typer(entry.load(), name=entry.name)


def main() -> None:
    """Entry point of the command ``miles``."""
    add_commands_of_packages()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: threads that wait by spinning starve whoever works
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the live view is the progress
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        code = app(standalone_mode=False)  # what typer.Exit was given comes back as a number, else None
        if code:
            sys.exit(code)
    except MilesError as error:
        errors.print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True)
        for note in getattr(error, "__notes__", []):
            errors.print(escape(note), soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, asyncio.CancelledError, typer.Abort):
        errors.print("interrupted")
        sys.exit(130)
    except Exception as error:
        code = getattr(error, "exit_code", None)  # click's usage errors
        if code is None or not hasattr(error, "format_message"):
            raise
        said = error.format_message()  # ty: ignore[not-callable]
        if said:  # not of a command that shows its help for want of arguments
            errors.print(f"[bold red]error[/] {escape(said)}", soft_wrap=True)
        sys.exit(code)
