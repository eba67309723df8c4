"""Options of the built-in algorithms, torch-free; each names the function in ``miles_core.algorithms`` that it is for.

A new algorithm is one function there, one class here and one entry point; or, outside this package, one function named as
``module:attribute`` whose keyword-only arguments are its options.
"""
