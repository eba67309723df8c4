"""Miles: protocols, the Sample, the loop, algorithms, configuration and the command line."""

__version__ = "0.1.0"
