"""One folder an op: `__init__.py` (public function and autograd), `reference.py` (torch), faster forms beside it, and `spec.py` (what tests
and benchmarks iterate over)."""
