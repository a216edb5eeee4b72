"""Choosing a step of a run, with one message for a step that is not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.naming import model_name

__all__ = ["at_step", "step_of"]


def step_of(run: Any, step: int | None = None) -> int:
    """The probed step that was asked for, or the run's last one.

    Raises
    ------
    StoreError : the run holds no step yet
    UsageError : it holds no such step; the message names the nearest
    """
    steps = np.asarray(run.steps)
    name = model_name(run.attrs)
    if not steps.size:
        raise StoreError(f"the run of {name} holds no step yet; wait until the first probe is written")
    if step is None:
        return int(steps[-1])
    if step not in steps:
        nearest = sorted(sorted(steps.tolist(), key=lambda probed: abs(probed - step))[:3])
        raise UsageError(
            f"the run of {name} has no step {step}; the nearest are {', '.join(map(str, nearest))}"
        )
    return int(step)


def at_step(dataset: xr.Dataset, step: int) -> xr.Dataset:
    """The dataset at a step; one that does not grow is the same at all."""
    return dataset.sel(step=step) if "step" in dataset.dims else dataset
