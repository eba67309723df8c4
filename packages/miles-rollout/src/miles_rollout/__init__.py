"""Engines, fleet, router, sessions and weight transports: how Miles generates."""

__version__ = "0.1.0"
