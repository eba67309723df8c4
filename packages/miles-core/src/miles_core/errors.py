"""Errors a person can act on: what was found, what was expected, what to do."""


class MilesError(Exception):
    """Something a user can fix. The message is one or two sentences; the command line prints it without a traceback."""


class ConfigError(MilesError):
    """A recipe, an override or a combination of settings is wrong."""


class PluginError(MilesError):
    """A plug-in is missing, does not import, or does not keep its point's Protocol."""


class DataError(MilesError):
    """A row, a file, a sample or a reward is not what it must be. Names file and line, or sample and column."""


class RunError(MilesError):
    """A run cannot go on: a deadline passed, a disk is full, nothing is left to train on."""


class StepRefused(RunError):
    """A trainer refused a batch before anything changed: its weights are those before the call of ``step``."""


class RanksLost(RunError):
    """The ranks of a model are gone, and what they held with them: one of them died, failed or was silent."""


class CheckpointError(MilesError):
    """A cut is missing, truncated or belongs to another configuration."""


class InfrastructureFailure(Exception):
    """A worker, an engine or a sandbox failed, not the policy. The trajectory is issued again, never scored 0."""


def class_name(error: MilesError) -> str:
    """Name of the class in this module that an error is of: another process may not know a subclass from elsewhere."""
    return next(c.__name__ for c in type(error).__mro__ if globals().get(c.__name__) is c)
