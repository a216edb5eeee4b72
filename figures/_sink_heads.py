"""Heads in the order of how strongly they sink, for figures that show a few of them."""

from __future__ import annotations

import numpy as np
import xarray as xr
from jaxtyping import Float

from osp_diag.analyses.summary.numbers import sink_rate_at
from osp_diag.errors import StoreError
from osp_diag.figures._runs import nothing_finite, statistics
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.schema import SINK_EPSILON, SINK_POSITION

__all__ = ["heads_by_sink", "sink_strength"]


def sink_strength(
    rate: Float[np.ndarray, "layer head"], mass: Float[np.ndarray, "layer head"]
) -> Float[np.ndarray, "layer head"]:
    """What heads are ordered by: the sink rate, and among equals the attention to the first token.

    Rates are multiples of 1 / sequences, which a millionth of a mass (at most 1) never bridges.
    """
    return np.nan_to_num(rate, nan=-1.0) + 1e-6 * np.nan_to_num(mass)


def heads_by_sink(
    run: Run, layers: list[int], figure: str, *, head: int | None = None, step: int | None = None
) -> xr.Dataset:
    """The heads of these layers, the strongest sink first.

    Parameters
    ----------
    figure : the name of the figure, for messages
    head : only this one of each layer
    step : of training; the last one by default

    Returns
    -------
    ``layer``, ``head``, ``sink_rate`` (ε = 0.3, k = 0) and ``first_token_attention`` along ``place``, in
    the order of :func:`sink_strength`. Heads of which nothing is known, because their queries are NaN, are
    left out.

    Raises
    ------
    StoreError : no head of these layers has a finite rate
    """
    attention = statistics(run, "attention", ("sink_rate", "first_token_attention"), figure, step)
    rate = sink_rate_at(attention["sink_rate"])
    if rate is None:
        raise StoreError(
            f"{figure} orders heads by their sink rate at ε = {SINK_EPSILON:g} and position {SINK_POSITION}, "
            f"which the run of {model_name(run.attrs)} does not hold; probe again with the estimator's own "
            "thresholds"
        )
    rate = rate.sel(layer=[layer for layer in layers if layer in rate["layer"].values])
    rate = rate.transpose("layer", "head")
    mass = attention["first_token_attention"].sel(stratum="all", drop=True).sel(layer=rate["layer"])
    mass = mass.transpose("layer", "head")
    score = sink_strength(rate.values, mass.values)
    order = np.argsort(-score, axis=None, kind="stable")
    rows, columns = np.unravel_index(order[np.isfinite(rate.values.ravel()[order])], score.shape)
    if not len(rows):
        raise StoreError(nothing_finite(run, "the sink rate of these layers", figure))
    if head is not None:
        rows, columns = rows[columns == head], columns[columns == head]
    return xr.Dataset(
        {
            "layer": ("place", rate["layer"].values[rows]),
            "head": ("place", columns),
            "sink_rate": ("place", rate.values[rows, columns]),
            "first_token_attention": ("place", mass.values[rows, columns]),
        }
    )
