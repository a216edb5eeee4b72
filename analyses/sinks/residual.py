"""What the sink token looks like in the residual stream that a layer reads."""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.errors import OspDiagError
from osp_diag.runs.run import Run

__all__ = ["residual_of_sink"]


def residual_of_sink(run: Run, step: int, layers: np.ndarray) -> xr.Dataset:
    """The first token against the rest, at the input of each of ``layers``.

    The input of a layer is the output of the block before it (``residual_post``), and the embedding for the
    first. NaN where the run lacks the site or the statistic.

    Returns
    -------
    ``residual_spike`` (layer): root mean square over channels of the first token's state, over that of
    the tokens that are neither first nor delimiters (Guo et al. 2024 compare norms); ``residual_massive``
    (layer): massive activations of the first token, per sequence.
    """
    embedding, blocks = (_by_layer(run, site, step) for site in ("embedding", "residual_post"))
    absent = (np.nan, np.nan)
    inputs = [
        embedding.get(0, absent) if layer == 0 else blocks.get(int(layer) - 1, absent) for layer in layers
    ]
    spike, massive = np.array(inputs, dtype=np.float64).reshape(-1, 2).T
    return xr.Dataset(
        {"residual_spike": ("layer", spike), "residual_massive": ("layer", massive)},
        coords={"layer": layers},
    )


def _by_layer(run: Run, site: str, step: int) -> dict[int, tuple[float, float]]:
    """Layer → spike and massive activations of the first token in the site's states."""
    try:
        at = run.at(site).sel(step=step)
    except OspDiagError:
        return {}
    # A run with kinds for all its tokens has no stratum of first ones.
    if "layer" not in at.coords or "stratum" not in at.coords or "first" not in at["stratum"].values:
        return {}
    spike, massive = (np.full(at.sizes["layer"], np.nan) for _ in range(2))
    if "channel_rms" in at:
        rms = at["channel_rms"].sel(stratum=["first", "rest"]).transpose("stratum", "layer", "channel")
        # RMS over channels of each stratum's state: √ of the mean of the channels' mean squares.
        first, rest = (rms.values.astype(np.float64) ** 2).mean(-1)
        spike = np.sqrt(np.divide(first, rest, out=spike, where=rest > 0))
    if "massive_activation_count" in at:
        massive = at["massive_activation_count"].sel(stratum="first").values.astype(np.float64)
    layers = at["layer"].values
    return {int(layer): (spike[row], massive[row]) for row, layer in enumerate(layers)}
