"""Scalars of a run by name, whether or not it has them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from osp_diag.runs.run import Run

__all__ = ["scalar"]


def scalar(run: Run, name: str) -> Float[np.ndarray, " row"]:
    """A scalar at the steps of ``run.series``: NaN where it was not recorded, everywhere if it never was."""
    series = run.series
    return series[name].values if name in series else np.full(series.sizes["step"], np.nan)
