"""Products with the weight of a linear layer, without gradients, by the library that multiplies matrices fastest here.

A backend (``registry.backend("linear", device)``) is a module with `product` and `added`; what they give is said in `reference`. It may
prepare itself for each new number of rows, which costs up to a millisecond: bring few different ones.
"""
