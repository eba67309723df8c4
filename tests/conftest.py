"""Settings of the whole suite. Shared material is in ``fixtures`` (importable: ``pythonpath`` in the root pyproject)."""

import os

# Before torch is imported: tests compute on tiny tensors, on which a second thread costs more than it brings.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# Machines are shared: no deadline per example. MILES_HYPOTHESIS=thorough draws 500 of each.
settings.register_profile("miles", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=500, derandomize=True)
settings.load_profile(os.environ.get("MILES_HYPOTHESIS", "miles"))
