"""Algorithms as pure functions on packed torch columns, reducing only through SegmentOps. Needs ``miles-core[torch]``.

An algorithm is advantage × loss terms × aggregation (× ratio level × correction × KL, as they come). Each is one function;
its options are its keyword-only arguments, declared torch-free in ``miles_core.algorithm_configs``.
"""
