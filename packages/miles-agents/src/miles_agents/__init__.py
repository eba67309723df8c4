"""Environments, tools, sandbox and search: what Miles acts in."""

__version__ = "0.1.0"
