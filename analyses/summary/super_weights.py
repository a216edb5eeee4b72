"""Which single weights of a run's down projections make a layer's largest activation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.schema import DOWN_WEIGHT

__all__ = ["super_weights"]


def super_weights(sites: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """The field of the summary, by the rule of the estimator ``super_weight``; none without it."""
    weights = sites.get(DOWN_WEIGHT)
    if weights is None or "super_weight" not in weights or not np.isfinite(weights["super_weight"]).any():
        return {}
    names = ["super_weight", "super_weight_row", "super_weight_column", "super_weight_value"]
    scalars = weights[names].load()
    found = scalars.isel(layer=np.flatnonzero(scalars["super_weight"].values == 1))
    return {
        "super_weights": tuple(
            (int(layer), int(row), int(column), float(value))
            for layer, row, column, value in zip(
                found["layer"].values,
                found["super_weight_row"].values,
                found["super_weight_column"].values,
                found["super_weight_value"].values,
                strict=True,
            )
        )
    }
