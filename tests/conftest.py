"""Settings of the whole suite. Shared material is in ``fixtures`` (importable: ``pythonpath`` in the root pyproject)."""

import os

# Before torch is imported: tests compute on tiny tensors, on which a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("miles", deadline=None, max_examples=25, derandomize=True)  # machines are shared: no deadline per example
settings.load_profile("miles")
