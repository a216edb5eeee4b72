"""Which channels are hot, step by step: whether they stay the same, when each is born and when it dies."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from osp_diag.analyses.channels.profiles import HOT, relative_rms
from osp_diag.errors import OspDiagError, StoreError, UsageError
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run

__all__ = ["TOP", "hot_channels", "of_site"]

TOP = 4
"""Channels in the sets that are compared between steps."""


def of_site(run: Run, site: str, variable: str, analysis: str) -> xr.DataArray:
    """A variable of a site; a StoreError says what is missing and how to get it.

    Parameters
    ----------
    analysis : its name, for the message
    """
    model = model_name(run.attrs)
    try:
        dataset = run.at(site)
    except (OspDiagError, KeyError):
        raise StoreError(
            f"{analysis} needs the site {site!r}, which the run of {model} does not hold; probe again with "
            "it among --sites"
        ) from None
    if variable not in dataset or "step" not in dataset[variable].dims:
        raise StoreError(
            f"{analysis} needs {variable} by step at {site!r}, which the run of {model} does not hold; probe "
            "again with the estimator among --estimators"
        )
    return dataset[variable]


def hot_channels(run: Run, *, site: str = "residual_post", top: int = TOP, times: float = HOT) -> xr.Dataset:
    """Identity of the hot channels of a site over training.

    A channel is hot at a step if its RMS over tokens is at least ``times`` the median channel's, of the same
    layer and stratum. It is born at the first probed step at which it is hot, and dead from the first probed
    step after the last one. Early outliers wander, later ones settle (Dong 2026): ``top_overlap``
    tells which.

    Returns
    -------
    ``hot_count`` and ``top_overlap`` (step, layer, stratum): the number of hot channels, and the Jaccard
    overlap of the sets of ``top`` largest channels at this probed step and the one before (two random sets:
    the attribute ``chance``); ``birth``, ``death`` (layer, stratum, channel): steps, NaN for a channel that
    was never hot or never died; ``hot_steps``: at how many probed steps it was hot; ``peak``: its largest
    ratio to the median channel.

    Raises
    ------
    UsageError : ``top`` or ``times`` out of range
    StoreError : the run holds no ``channel_rms`` by step at that site
    """
    rms = of_site(run, site, "channel_rms", "hot_channels").transpose("step", "layer", "stratum", "channel")
    width = rms.sizes["channel"]
    if not 1 <= top < width or times <= 1:
        raise UsageError(
            f"hot_channels: top is from 1 to {width - 1} and times above 1, not {top} and {times:g}"
        )
    parts = [_of_layer(rms.sel(layer=layer).load(), top, times) for layer in rms["layer"].values]
    dataset = xr.concat(parts, dim=rms["layer"]).transpose("step", "layer", "stratum", "channel", ...)
    definitions = {
        "hot_count": ("channels", f"channels whose RMS is at least {times:g} times the median channel's"),
        "top_overlap": ("1", f"Jaccard overlap of the {top} largest channels with those of the probe before"),
        "birth": ("step", "first probed step at which the channel is hot"),
        "death": ("step", "first probed step after the last one at which the channel is hot"),
        "hot_steps": ("probes", "probed steps at which the channel is hot"),
        "peak": ("1", "largest ratio of the channel's RMS to the median channel's"),
    }
    for name, (units, definition) in definitions.items():
        dataset[name].attrs = {"units": units, "definition": definition}
    # Two random sets of `top` channels out of `width` share top² / width on average; their Jaccard overlap is
    # that over the size of the union.
    shared = top * top / width
    dataset.attrs = {"site": site, "top": top, "times": times, "chance": shared / (2 * top - shared)}
    return dataset


def _of_layer(rms: xr.DataArray, top: int, times: float) -> xr.Dataset:
    values = rms.values.astype(np.float64)
    steps = rms["step"].values.astype(float)
    ratio = np.nan_to_num(relative_rms(values))
    hot = ratio >= times
    ever = hot.any(axis=0)
    # argmax gives the first hot step; of the reversed axis, the last one. Dead is what is not hot at the end.
    last = len(steps) - 1 - hot[::-1].argmax(axis=0)
    dead = ever & (last < len(steps) - 1)
    channel = ("stratum", "channel")
    return xr.Dataset(
        {
            "hot_count": (("step", "stratum"), hot.sum(axis=-1).astype(float)),
            "top_overlap": (("step", "stratum"), _overlap(values, top)),
            "birth": (channel, np.where(ever, steps[hot.argmax(axis=0)], np.nan)),
            "death": (channel, np.where(dead, steps[np.minimum(last + 1, len(steps) - 1)], np.nan)),
            "hot_steps": (channel, hot.sum(axis=0)),
            "peak": (channel, ratio.max(axis=0)),
        },
        coords={
            "step": rms["step"].values,
            "stratum": [str(name) for name in rms["stratum"].values],
            "channel": rms["channel"].values,
        },
    )


def _overlap(
    values: Float[np.ndarray, "step stratum channel"], top: int
) -> Float[np.ndarray, "step stratum"]:
    """Jaccard overlap of the largest channels with those of the probe before; NaN at the first one."""
    member: Bool[np.ndarray, "step stratum channel"] = np.zeros(values.shape, dtype=bool)
    order = np.argsort(-values, axis=-1, kind="stable")[..., :top]
    np.put_along_axis(member, order, True, axis=-1)
    # Jaccard of two sets of `top` members: |A ∩ B| / (2·top − |A ∩ B|).
    shared = (member[1:] & member[:-1]).sum(axis=-1)
    unknown = np.isnan(values).any(axis=-1)
    overlap = np.where(unknown[1:] | unknown[:-1], np.nan, shared / (2 * top - shared))
    return np.concatenate([np.full((1, values.shape[1]), np.nan), overlap])
