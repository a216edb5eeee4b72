"""The one error family. Every message says what was wrong, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "CheckpointError",
    "DivergenceError",
    "EstimatorError",
    "MissingError",
    "NonFiniteError",
    "OspDiagError",
    "SiteError",
    "StoreError",
    "TokenError",
    "TrainingError",
    "UsageError",
]


class OspDiagError(Exception):
    """Base of every error that osp_diag raises on purpose.

    The command line prints its message without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class UsageError(OspDiagError, ValueError):
    """An option or argument has a value that cannot be meant."""


class CheckpointError(OspDiagError):
    """A checkpoint cannot be opened: wrong path, unsupported or truncated file."""


class TokenError(OspDiagError):
    """The tokens do not fit: empty text, too few of them, or a foreign vocabulary."""


class SiteError(OspDiagError):
    """The blocks or sites of a model were not found where they were looked for."""


class CaptureError(OspDiagError):
    """Activations cannot be observed under the present conditions."""


class EstimatorError(OspDiagError):
    """An estimator is unknown, defined twice, or given a parameter out of range."""


class NonFiniteError(OspDiagError):
    """NaN or Inf where numbers are needed."""


class StoreError(OspDiagError):
    """A run cannot be opened, or does not match what would be appended to it."""


class MissingError(StoreError, KeyError):
    """A run does not hold what is asked of it by name: a site, a statistic, a step's raw sums."""

    # KeyError shows its argument's repr; a message is to be read.
    __str__ = Exception.__str__


class TrainingError(OspDiagError):
    """A training run cannot start or go on: misrouted parameters, divergence, a foreign checkpoint."""


class DivergenceError(TrainingError):
    """A step of training diverged; what was asked for was done, and what it found is bad."""

    exit_code = 1
