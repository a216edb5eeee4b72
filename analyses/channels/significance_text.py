"""What a comparison of channels says of significance."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.significance import LEVEL
from osp_diag.wording import number

__all__ = ["SIGNIFICANCE_NUMBERS", "significance_lines"]

_STATISTICS = {"top_share": "energy in the largest channel", "osp_excess_kurtosis": "OSP kurtosis"}
_STREAM = ("residual_post", "embedding", "final_norm")

SIGNIFICANCE_NUMBERS = (
    *(f"{name}_difference{suffix}" for name in _STATISTICS for suffix in ("", "_margin", "_q")),
    "different_channels",
)
"""By layer, first minus second."""


def significance_lines(data: xr.Dataset) -> Iterator[str]:
    """Both statistics with their intervals where they differ most, and how many channels differ by index."""
    if "top_share" not in data:
        return
    held = [site for site in _STREAM if site in data["site"].values]
    site = next((one for one in held if bool(data["top_share"].sel(site=one).notnull().any())), None)
    if site is None:
        return
    part = data.sel(site=site)
    for name, said in _STATISTICS.items():
        difference, q = part[f"{name}_difference"], part[f"{name}_difference_q"]
        known = difference.notnull()
        if not bool(known.any()):
            continue
        layer = difference["layer"].values[int(np.nanargmax(np.abs(difference.values)))]
        here = part.sel(layer=layer)
        a, b = (
            f"{_shown(name, value)} \u00b1 {_shown(name, margin)}"
            for value, margin in zip(here[name].values, here[f"{name}_margin"].values, strict=True)
        )
        yield (
            f"Significance, {said} at {site}: {a} (A) and {b} (B) in layer {int(layer)}, where they differ "
            f"most; different in {int((q < LEVEL).sum())} of {int(known.sum())} layers"
        )
    if "different_channels" in data and bool(part["different_channels"].notnull().any()):
        counted = part["different_channels"]
        channels = int(part["width"].values[0]) * int(counted.notnull().sum())
        yield (
            f"  by index, {int(counted.sum()):,} of {channels:,} channels (all layers of {site}) differ at a "
            f"false discovery rate of {LEVEL:.0%}"
        )


def _shown(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.1%}" if name == "top_share" else number(float(value))
