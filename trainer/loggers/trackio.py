"""Scalars to trackio, which keeps them in a local database."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from osp_diag.monitoring import Finding

if TYPE_CHECKING:
    import trackio

__all__ = ["TrackioLogger", "open_logger"]


class TrackioLogger:
    """Sends scalars to a trackio run; finishes it if ``owns_run``."""

    def __init__(self, run: trackio.Run, *, owns_run: bool) -> None:
        self._run, self._owns_run = run, owns_run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def alert(self, finding: Finding) -> None:
        import trackio

        levels = {"bad": trackio.AlertLevel.ERROR, "watch": trackio.AlertLevel.WARN}
        with redirect_stdout(sys.stderr):
            self._run.alert(finding.rule, finding.sentence, levels[finding.severity], finding.step)

    def histograms(self, step: int, values: Mapping[str, Float[np.ndarray, " channel"]]) -> None:
        import trackio

        self._run.log({name: trackio.Histogram(of) for name, of in values.items()}, step=step)

    def close(self) -> None:
        if not self._owns_run:
            return
        import trackio
        from trackio import context_vars

        with redirect_stdout(sys.stderr):
            if context_vars.current_run.get() is self._run:
                trackio.finish()
            else:
                self._run.finish()


def open_logger(
    *,
    run: str,
    config: Mapping[str, Any],
    project: str,
    directory: str | Path | None,
    resumed_after: int | None,
) -> TrackioLogger:
    """The run that is open in this process, or a new one. See
    :func:`osp_diag.trainer.loggers.open_loggers`."""
    import trackio
    from trackio import context_vars

    active = context_vars.current_run.get()
    if active is not None:
        return TrackioLogger(active, owns_run=False)
    # What trackio prints is for people; standard output is the command's own.
    with redirect_stdout(sys.stderr):
        new_run = trackio.init(
            project=project,
            name=run,
            config=dict(config),
            resume="never" if resumed_after is None else "allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    return TrackioLogger(new_run, owns_run=True)
