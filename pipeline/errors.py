"""Every error ByeSight raises on purpose. A message says what is wrong, where (row, file, limit) and how to mend it."""

from __future__ import annotations


class ByeSightError(Exception):
    """Base of all errors that a user can mend; the command line prints it without a traceback."""


class ConfigError(ByeSightError):
    """A configuration value is unknown, out of range, or contradicts another."""


class SubmissionError(ByeSightError):
    """A submission as a whole can't be read: unknown format, no usable row, unsafe container."""


class ModelError(ByeSightError):
    """A base model, adapter or guard is refused: pickled weights, remote code, another base, wrong shapes."""


class IntegrityError(ByeSightError):
    """A stored or delivered file is not what its manifest says."""


class StageError(ByeSightError):
    """A stage can't give a result that should be used: NaN loss, non-finite scores, too few rows."""


class RemovalCapError(StageError):
    """The rows to remove are more than the configured share; a person must look before anything is removed."""


class RefusedInputError(ByeSightError):
    """The guard's action is `refuse` and at least one input of the call was flagged; the guarded model's `records` say which."""
