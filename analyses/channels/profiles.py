"""Profiles of channels that can be compared between models of different width and scale.

s_j is the RMS of channel j over tokens (``channel_rms``). Two things make profiles comparable: s_j is
divided by the lower median channel of its layer, and channels are counted in shares of the width.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from scipy.stats import wasserstein_distance

from osp_diag.estimators.neuron_kurtosis import relative_energy

__all__ = [
    "HOT",
    "SMALLEST",
    "concentration_curve",
    "concentration_distance",
    "decades",
    "hot_distance",
    "is_hot",
    "lower_median",
    "over_median",
    "peak_distance",
    "profile_distance",
    "relative_rms",
    "top_profile",
]

HOT = 5.0
"""A channel is hot where its RMS is at least so many times that of its layer's median channel."""
SMALLEST = 1e-6
"""Channels below this share of the median count as so large: a dead channel has no logarithm."""


def lower_median(
    values: Float[np.ndarray, "*layers channel"],
) -> Float[np.ndarray, "*layers 1"]:
    """The lower of the two middle values along the last axis, as everywhere here: an element of the data."""
    # Why the lower median: docs/decisions.md, Estimators.
    return np.asarray(np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2, None])


def over_median(values: xr.DataArray, dim: str) -> xr.DataArray:
    """Values over their lower median along ``dim``; not finite where that is 0."""
    last = values.transpose(..., dim)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (last / lower_median(last.values)).transpose(*values.dims)


def relative_rms(rms: Float[np.ndarray, "*layers channel"]) -> Float[np.ndarray, "*layers channel"]:
    """s_j / median_k s_k, the lower median over the channels of a layer.

    NaN throughout a layer whose median is 0, or in which a channel is NaN or infinite.
    """
    median = lower_median(rms)
    valid = np.isfinite(rms).all(axis=-1, keepdims=True) & (median > 0)
    return np.divide(rms, median, out=np.full_like(rms, np.nan, dtype=np.float64), where=valid)


def decades(relative: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """log10 of relative RMS, not below log10 of ``SMALLEST``."""
    return np.log10(np.maximum(relative, SMALLEST))


def is_hot(relative: Float[np.ndarray, "*any"]) -> Bool[np.ndarray, "*any"]:
    """Which channels are hot, from their :func:`relative_rms`; where that is NaN none is."""
    return relative >= HOT


def profile_distance(first: Float[np.ndarray, " a"], second: Float[np.ndarray, " b"]) -> float:
    """Wasserstein-1 distance between two layers' channels on the scale log10 (s_j / median), in decades.

    ∫₀¹ |Q_A(u) − Q_B(u)| du with the quantile functions Q of both sets of channels: by how many decades
    the sorted profiles differ on average. 0 if and only if they are equal; neither the order of channels,
    nor the scale, nor the width matters. Relative RMS goes in; NaN where either has any.
    """
    if np.isnan(first).any() or np.isnan(second).any():
        return float("nan")
    return float(wasserstein_distance(decades(first), decades(second)))


def peak_distance(first: Float[np.ndarray, " a"], second: Float[np.ndarray, " b"]) -> float:
    """|log10 max_j (s_j / median)_A − the same of B|, in decades: the hottest channels alone.

    In the profile distance one channel in thousands has next to no weight; here it has all.
    """
    return float(abs(decades(first.max()) - decades(second.max())))


def hot_distance(first: Float[np.ndarray, " a"], second: Float[np.ndarray, " b"]) -> float:
    """Mean of |log10 r_A(k) − log10 r_B(k)| over the ranks k at which either model has a hot channel.

    r(k) is the k-th largest s_j / median, so hot channels are matched by height, not by index. In decades;
    0 where neither has a hot channel, NaN where a profile is.
    """
    if np.isnan(first).any() or np.isnan(second).any():
        return float("nan")
    count = max(int(is_hot(first).sum()), int(is_hot(second).sum()))
    count = min(count, len(first), len(second))
    if not count:
        return 0.0
    heights = [decades(np.sort(values)[::-1][:count]) for values in (first, second)]
    return float(np.abs(heights[0] - heights[1]).mean())


def concentration_curve(
    rms: Float[np.ndarray, "*layers channel"],
) -> Float[np.ndarray, "*layers count"]:
    """C(k), the share of Σ_j s_j² in the k largest channels, for k = 0 … d; k/d if every channel is 0."""
    # relative_energy is s_j² over its mean (1 if all are 0), so over the width it is the share of the sum.
    share = np.asarray(relative_energy(rms**2)) / rms.shape[-1]
    total = np.cumsum(np.sort(share, axis=-1)[..., ::-1], axis=-1)
    curve = np.concatenate([np.zeros_like(total[..., :1]), total], axis=-1)
    return np.minimum(curve, 1.0)


def concentration_distance(first: Float[np.ndarray, " a"], second: Float[np.ndarray, " b"]) -> float:
    """max over u of |C_A(u) − C_B(u)|, where C(u) is the share of energy in the largest u·d channels.

    Between whole channels C is linear (it is a Lorenz curve from the top), so the maximum lies at a whole
    channel of one of the two. In [0, 1]; concentration curves of :func:`concentration_curve` go in.
    """
    shares = [np.linspace(0, 1, len(curve)) for curve in (first, second)]
    # Both curves at the whole channels of either.
    places = np.union1d(*shares)
    difference = np.interp(places, shares[0], first) - np.interp(places, shares[1], second)
    return float(np.abs(difference).max())


def top_profile(
    relative: Float[np.ndarray, "*layers channel"], shares: Float[np.ndarray, " share"]
) -> Float[np.ndarray, "*layers share"]:
    """The sorted profile: s_j / median of the ⌈u·d⌉-th largest channel for each share u of the width."""
    d = relative.shape[-1]
    # Rounded, so that u = k/d, which is seldom exact, is channel k and not the next one.
    place = np.clip(np.ceil(np.round(shares * d, 9)).astype(int) - 1, 0, d - 1)
    return np.sort(relative, axis=-1)[..., ::-1][..., place]
