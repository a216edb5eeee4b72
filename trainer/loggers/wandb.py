"""Scalars to Weights & Biases, online or offline as its own environment variables say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from osp_diag.monitoring import Finding

if TYPE_CHECKING:
    import wandb

__all__ = ["STEP", "WandbLogger", "open_logger"]

STEP = "step"
"""Numbers carry their step as a metric of its own. W&B's counter cannot go back after a resumption, and in a
run that somebody else logs to as well it counts their calls."""


class WandbLogger:
    """Sends scalars to a W&B run; finishes it if ``owns_run``."""

    def __init__(self, run: wandb.Run, *, owns_run: bool) -> None:
        self._run, self._owns_run = run, owns_run
        self._metrics: set[str] = set()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name in values.keys() - self._metrics:
            self._run.define_metric(name, step_metric=STEP)
            self._metrics.add(name)
        self._run.log({STEP: step, **values})

    def alert(self, finding: Finding) -> None:
        levels = {"bad": "ERROR", "watch": "WARN"}
        self._run.alert(finding.rule, finding.sentence, levels[finding.severity])

    def histograms(self, step: int, values: Mapping[str, Float[np.ndarray, " channel"]]) -> None:
        import wandb

        self.log(step, {name: wandb.Histogram(of.tolist()) for name, of in values.items()})

    def close(self) -> None:
        if self._owns_run:
            self._run.finish()


def open_logger(
    *,
    run: str,
    config: Mapping[str, Any],
    project: str,
    directory: str | Path | None,
    resumed_after: int | None,
) -> WandbLogger:
    """The run that is open in this process, or a new one. See
    :func:`osp_diag.trainer.loggers.open_loggers`."""
    import wandb

    if wandb.run is not None:
        return WandbLogger(wandb.run, owns_run=False)
    new_run = wandb.init(
        project=project,
        name=run,
        config={**config, "resumed_after": resumed_after},
        dir=directory,
    )
    return WandbLogger(new_run, owns_run=True)
