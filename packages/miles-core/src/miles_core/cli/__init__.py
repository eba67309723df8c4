"""The command line ``miles``. Imported only by the command itself: typer and rich stay out of ``import miles_core``."""

from .app import main

__all__ = ["main"]
