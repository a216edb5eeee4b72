"""Long trainings made short enough to look at: a run at some of its probed steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from osp_diag.runs.run import Run

__all__ = ["evenly", "thinned_run"]


def evenly(count: int, limit: int) -> Int[np.ndarray, " place"]:
    """At most ``limit`` places of ``range(count)``: the first, the last, and evenly between."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, max(limit, 1)))).astype(np.int64))


def thinned_run(run: Run, limit: int, *, always: Sequence[int] = ()) -> Run:
    """The run at ``limit`` of its probed steps, evenly spaced, and at the steps ``always``.

    It is read as lazily as the run itself. A run that is short enough is returned itself.
    """
    steps = np.asarray(run.steps)
    if len(steps) <= limit:
        return run
    places = np.union1d(evenly(len(steps), limit), np.flatnonzero(np.isin(steps, always)))
    return Run(run.tree.isel(step=places, missing_dims="ignore"), run.path)
