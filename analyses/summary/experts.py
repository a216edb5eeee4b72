"""What a summary says of a mixture of experts: how sure its router is, and how even the load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.schema import ROUTER

__all__ = ["experts"]


def experts(sites: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Fields of the summary, of all tokens; none where there are no experts."""
    router = sites.get(ROUTER)
    if router is None:
        return {}
    fields: dict[str, Any] = {}
    if "router_entropy" in router:
        entropy = router["router_entropy"].sel(stratum="all").values
        if np.isfinite(entropy).any():
            fields["router_entropy"] = float(np.nanmean(entropy))
    if "expert_load" in router:
        load = router["expert_load"].sel(stratum="all")
        # A layer without a choice, or with fewer experts than another, has NaN there.
        known = load.values[np.isfinite(load.values).any(axis=1)]
        fields["experts"] = int(load.sizes["expert"])
        if len(known):
            fields["idle_experts"] = int((known == 0).sum())
            ratio = router["expert_load_max"].sel(stratum="all").values
            top = int(np.nanargmax(ratio))
            fields["expert_load_max"] = float(ratio[top])
            fields["expert_load_max_layer"] = int(load["layer"].values[top])
            fields["expert_load_max_expert"] = int(np.nanargmax(load.values[top]))
    return {key: value for key, value in fields.items() if not _is_nan(value)}


def _is_nan(value: float) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
