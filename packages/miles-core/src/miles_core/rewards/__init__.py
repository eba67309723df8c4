"""Rewards that come with miles-core: ``math``."""
