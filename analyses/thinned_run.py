"""Long trainings made short enough to look at: a run at some of its probed steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from osp_diag.runs.run import Run

__all__ = ["evenly", "thinned_run"]


def evenly(count: int, most: int) -> Int[np.ndarray, " place"]:
    """At most ``most`` places of ``range(count)``: the first, the last, and evenly between."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, max(most, 1)))).astype(np.int64))


def thinned_run(run: Any, most: int, *, always: Sequence[int] = ()) -> Any:
    """The run at ``most`` of its probed steps, evenly spaced, and at the steps ``always``.

    It is read as lazily as the run itself. A run that is short enough is given back as it is.
    """
    steps = np.asarray(run.steps)
    if len(steps) <= most:
        return run
    kept = np.union1d(evenly(len(steps), most), np.flatnonzero(np.isin(steps, always)))
    return Run(run.tree.isel(step=kept, missing_dims="ignore"), run.path)
