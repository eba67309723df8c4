"""``miles engine``: the environments of engines that run in processes of their own."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(help="Environments of engines that run in processes of their own.", no_args_is_help=True)
console = Console(highlight=False)


@app.command()
def install(name: Annotated[str, typer.Argument(help="Which environment; `miles engine list` shows them.")]) -> None:
    """Build an engine's environment from its pinned list. Does nothing if it is there."""
    from .sglang.environment import install as build

    interpreter = build(name, report=lambda line: console.print(escape(line), soft_wrap=True))
    console.print(f"{escape(name)} is installed: {escape(str(interpreter))}", soft_wrap=True)


@app.command("list")
def list_(json_: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """List the environments that can be installed, and those that are."""
    from .sglang.environment import look, names

    found = [look(name) for name in names()]
    if json_:
        print(json.dumps({e.name: {"state": e.state, "directory": str(e.directory)} for e in found}, indent=2))
        return
    table = Table("environment", "state", "where", box=None)
    for e in found:
        table.add_row(f"[bold]{e.name}[/]", e.state, escape(str(e.directory)))
    console.print(table, soft_wrap=True)
