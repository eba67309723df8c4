"""Rewards that come with miles-core; docs/rewards.md lists them."""
