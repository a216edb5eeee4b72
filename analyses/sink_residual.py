"""What the sink token looks like in the residual stream that a layer reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.errors import OspDiagError

__all__ = ["residual_of_sink"]


def residual_of_sink(run: Any, step: int, layers: np.ndarray) -> xr.Dataset:
    """The first token against the rest, at the input of each of ``layers``.

    The input of a layer is the output of the block before it (``residual_post``), and the embedding for the
    first. NaN where the run lacks the site or the statistic.

    Returns
    -------
    ``residual_spike`` (layer): root mean square over channels of the first token's state, over that of
    the tokens that are neither first nor delimiters (Guo et al. 2024 compare norms); ``residual_massive``
    (layer): massive activations of the first token, per sequence.
    """
    sites = {site: _at(run, site, step) for site in ("embedding", "residual_post")}
    spike, massive = (np.full(len(layers), np.nan) for _ in range(2))
    for place, layer in enumerate(layers):
        at = sites["embedding"] if layer == 0 else sites["residual_post"]
        before = 0 if layer == 0 else layer - 1
        if at is None or before not in at["layer"].values:
            continue
        state = at.sel(layer=before)
        if "channel_rms" in state:
            energy = (state["channel_rms"].astype(np.float64) ** 2).mean("channel")
            rest = float(energy.sel(stratum="rest"))
            spike[place] = np.sqrt(float(energy.sel(stratum="first")) / rest) if rest > 0 else np.nan
        if "massive_activation_count" in state:
            massive[place] = float(state["massive_activation_count"].sel(stratum="first"))
    return xr.Dataset(
        {"residual_spike": ("layer", spike), "residual_massive": ("layer", massive)},
        coords={"layer": layers},
    )


def _at(run: Any, site: str, step: int) -> xr.Dataset | None:
    try:
        dataset = run.at(site)
    except OspDiagError:
        return None
    kept = [name for name in ("channel_rms", "massive_activation_count") if name in dataset]
    found: xr.Dataset = dataset[kept].sel(step=step).load()
    return found if "layer" in found.coords else None
