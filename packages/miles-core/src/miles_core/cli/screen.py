"""Where commands print: standard output and standard error. Only a terminal has a width; into a file or a pipe a line goes whole."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def width() -> int | None:
    """Columns of the terminal; None where there is none."""
    return console.width if console.is_terminal else None


def print_wide(what: Table | Tree) -> None:
    """A table or tree, with nothing cut or folded where there is no terminal."""
    (console if width() else Console(highlight=False, width=10_000)).print(what)
