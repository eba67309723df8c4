"""Settings of the whole suite. Shared material is in ``fixtures`` (importable: ``pythonpath`` in the root pyproject)."""

from hypothesis import settings

settings.register_profile("miles", deadline=None, max_examples=25, derandomize=True)  # machines are shared: no deadline per example
settings.load_profile("miles")
