"""Made-up runs of known channels, for the tests of the comparison of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.runs.run import Run
from tests.synthetic_runs import STRATA

ATTRS: dict[str, Any] = {
    "model_name": "made-up",
    "model_fingerprint": "one",
    "protocol": "sequence",
    "bos": "no",
    "sequence_length": 8,
    "tokens": 64,
    "token_source": "made-up text",
    "token_fingerprint": "tokens",
    "tokenizer": "made-up",
    "dtype": "float32",
}


def profile(width: int, hot: Mapping[int, float] | None = None, scale: float = 1.0) -> np.ndarray:
    """RMS of channels: all 1 but the planted ones."""
    values = np.ones(width)
    for channel, height in (hot or {}).items():
        values[channel] = height
    return scale * values


def channel_run(
    sites: Mapping[str, np.ndarray],
    *,
    earlier: Mapping[str, np.ndarray] | None = None,
    rest: float = 1.0,
    groups: Mapping[str, xr.Dataset] | None = None,
    static: Mapping[str, xr.Dataset] | None = None,
    **attrs: Any,
) -> Run:
    """A run whose channel_rms at each site is (layer, channel); at step 0 that of ``earlier``, if given.

    In the stratum ``rest`` every channel is raised to the power ``rest`` of the others'; there are no
    delimiters.
    """
    steps = [(7, {name: _site(values, rest) for name, values in sites.items()} | dict(groups or {}))]
    if earlier is not None:
        steps.insert(0, (0, {name: _site(values, rest) for name, values in earlier.items()}))
    layers = max(len(values) for values in sites.values())
    return Run.in_memory(steps, static or {}, {**ATTRS, "number_of_layers": layers, **attrs})


def grouped_run(
    rng: np.random.Generator,
    *,
    heights: np.ndarray,
    noise: float = 0.05,
    groups: int = 8,
    kurtosis: float = 5.0,
    shared: np.ndarray | None = None,
    **attrs: Any,
) -> Run:
    """A run whose channels have mean squares of about heights² (layer, channel) in each group of batches.

    Parameters
    ----------
    noise : standard deviation of the logarithm of a channel's mean square in a group, and of the kurtosis
    shared : (group, layer, channel) what the tokens of each group add to the logarithm, in any model
    """
    layers, channels = heights.shape
    tokens = 100.0
    logarithm = noise * rng.standard_normal((groups, layers, channels))
    square = tokens * heights**2 * np.exp(logarithm + (0.0 if shared is None else shared))
    total = tokens * kurtosis * (1 + noise * rng.standard_normal((groups, layers)))
    count = np.full((layers, groups, len(STRATA)), tokens)
    dims = ("layer", "token_group", "stratum")

    def of_all(values: np.ndarray) -> np.ndarray:
        return np.stack([values.swapaxes(0, 1)] * len(STRATA), axis=2)

    sums = xr.Dataset(
        {
            "token.count": (dims, count),
            "channel.square": ((*dims, "channel"), of_all(square)),
            "osp_token_kurtosis.total": (dims, of_all(total)),
        },
        coords={"layer": np.arange(layers), "stratum": list(STRATA), "channel": np.arange(channels)},
    )
    whole = np.sqrt(square.mean(axis=0) / tokens)
    return channel_run({"residual_post": whole}, groups={"token_groups/residual_post": sums}, **attrs)


def _site(values: np.ndarray, rest: float) -> xr.Dataset:
    values = np.atleast_2d(values)
    by_stratum = {"all": values, "first": values, "delimiter": values * np.nan, "rest": values**rest}
    return xr.Dataset(
        {
            "channel_rms": (
                ("layer", "stratum", "channel"),
                np.stack([by_stratum[name] for name in STRATA], axis=1),
                {"estimator": "channel_moments/1"},
            )
        },
        coords={
            "layer": np.arange(len(values)),
            "stratum": list(STRATA),
            "channel": np.arange(values.shape[1]),
        },
    )
