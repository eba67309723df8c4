"""Trainers, packing, quantisation-aware training and export: how Miles learns."""

__version__ = "0.1.0"
