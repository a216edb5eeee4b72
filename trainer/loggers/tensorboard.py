"""Scalars to TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from osp_diag.monitoring import Finding

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardLogger", "open_logger"]


class TensorBoardLogger:
    """Sends scalars to a ``SummaryWriter``, and closes it."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def alert(self, finding: Finding) -> None:
        text = f"{finding.severity}: {finding.sentence}"
        self._writer.add_text(f"monitor/{finding.rule}", text, finding.step)

    def histograms(self, step: int, values: Mapping[str, Float[np.ndarray, " channel"]]) -> None:
        for name, of in values.items():
            self._writer.add_histogram(name, of, step)

    def close(self) -> None:
        self._writer.close()


def open_logger(
    *,
    run: str,
    config: Mapping[str, Any],
    project: str,
    directory: str | Path | None,
    resumed_after: int | None,
) -> TensorBoardLogger:
    """Event files in ``directory/run``. See :func:`osp_diag.trainer.loggers.open_loggers`."""
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(directory or "runs") / run
    if resumed_after is not None:
        return TensorBoardLogger(SummaryWriter(str(folder), purge_step=resumed_after + 1))
    writer = SummaryWriter(str(folder))
    # TensorBoard reads text as Markdown, in which an indented block is kept as it is.
    text = json.dumps({"project": project, **config}, indent=2, default=str)
    writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)
    return TensorBoardLogger(writer)
