"""Values and labelled arrays as JSON has them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["KINDS", "plain"]

KINDS = {"f": float, "i": int, "u": int, "b": bool, "U": str, "O": str}
"""Kind of an array's type → the type of its values in JSON."""


def plain(value: Any) -> Any:
    """A value for JSON, which has no NaN, no Inf and no arrays: those numbers are texts."""
    if isinstance(value, xr.Dataset):
        return {
            "coords": {str(name): _variable(array) for name, array in value.coords.items()},
            "data_vars": {str(name): _variable(array) for name, array in value.data_vars.items()},
            "attrs": plain(value.attrs),
        }
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _variable(array: xr.DataArray) -> dict[str, Any]:
    kind, values, attrs = KINDS[array.dtype.kind].__name__, plain(array.values), plain(array.attrs)
    return {"dims": list(array.dims), "type": kind, "values": values, "attrs": attrs}
