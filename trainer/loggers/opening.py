"""What a logger is, and several of them behind one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from osp_diag.errors import UsageError
from osp_diag.monitoring import Finding
from osp_diag.probing.ranks import is_first_rank

__all__ = ["LOGGERS", "Logger", "RichLogger", "open_loggers"]

LOGGERS = ("trackio", "wandb", "tensorboard")


@runtime_checkable
class Logger(Protocol):
    """Takes the scalars of a step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send ``values`` of ``step``; several calls may tell different values of one step."""

    def close(self) -> None:
        """Send what is left. A run that was not begun here stays open."""


@runtime_checkable
class RichLogger(Logger, Protocol):
    """Takes alerts and distributions too. Ours do; a logger of somebody's own need not."""

    def alert(self, finding: Finding) -> None:
        """Show what the monitor says, as an alert where there is such a thing, else as a text."""

    def histograms(self, step: int, values: Mapping[str, Float[np.ndarray, " channel"]]) -> None:
        """Show how ``values`` are distributed at ``step``."""


def open_loggers(
    names: Sequence[str],
    *,
    run: str,
    config: Mapping[str, Any],
    project: str = "osp-diag",
    directory: str | Path | None = None,
    resumed_after: int | None = None,
) -> Logger:
    """Open loggers by name, as one. Under several ranks only the first one's sends anything.

    Where trackio or W&B have a run open in this process (that of a Hugging Face Trainer, say), it is used and
    left open. A logger that fails later is dropped with a warning: training is worth more than its dashboard.

    Parameters
    ----------
    names : of ``trackio``, ``wandb``, ``tensorboard``
    run : its name on the dashboard
    config : shown beside it
    project : under which trackio and W&B keep it
    directory : where TensorBoard (default ``runs``) and W&B (default ``wandb``) write; trackio writes to
        the folder that its environment variable ``TRACKIO_DIR`` names
    resumed_after : the step from which training goes on; None if it begins. trackio continues the run of the
        same name, TensorBoard hides what was logged after the step, W&B begins another run.

    Raises
    ------
    UsageError : a name is unknown, or its library is not installed
    """
    names = (names,) if isinstance(names, str) else names
    unknown = [name for name in names if name not in LOGGERS]
    if unknown:
        raise UsageError(
            f"loggers: {', '.join(map(repr, unknown))} is unknown; there are {', '.join(LOGGERS)}"
        )
    loggers = _Several()
    if not is_first_rank():
        return loggers
    try:
        for name in dict.fromkeys(names):
            loggers.add(
                name,
                _adapter(name)(
                    run=run,
                    config=config,
                    project=project,
                    directory=directory,
                    resumed_after=resumed_after,
                ),
            )
    except BaseException:
        loggers.close()
        raise
    return loggers


def _adapter(name: str) -> Any:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"loggers: {name} cannot be imported ({error}); pip install 'osp-diag[loggers]'"
        ) from error
    return importlib.import_module(f"osp_diag.trainer.loggers.{name}").open_logger


class _Several:
    """Sends everything to each of some loggers."""

    def __init__(self) -> None:
        self._loggers: dict[str, Logger] = {}

    def add(self, name: str, logger: Logger) -> None:
        self._loggers[name] = logger

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, logger in list(self._loggers.items()):
            self._send(step, name, partial(logger.log, step, values))

    def alert(self, finding: Finding) -> None:
        for name, logger in list(self._loggers.items()):
            if isinstance(logger, RichLogger):
                self._send(finding.step, name, partial(logger.alert, finding))

    def histograms(self, step: int, values: Mapping[str, Float[np.ndarray, " channel"]]) -> None:
        for name, logger in list(self._loggers.items()):
            if isinstance(logger, RichLogger):
                self._send(step, name, partial(logger.histograms, step, values))

    def _send(self, step: int, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            del self._loggers[name]
            _warn(f"{name} failed at step {step} and gets no more numbers: {error!r}")

    def close(self) -> None:
        for name, logger in self._loggers.items():
            try:
                logger.close()
            except Exception as error:
                _warn(f"{name} failed when it was closed: {error!r}")
        self._loggers = {}


def _warn(message: str) -> None:
    warnings.warn(f"{message}; the run store is not affected", RuntimeWarning, stacklevel=4)
