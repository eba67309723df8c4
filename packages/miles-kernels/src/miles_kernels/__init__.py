"""Ops with a torch reference and Triton or DeepGEMM forms; knows nothing of RL."""

__version__ = "0.1.0"
