"""What the page shows: the reader's choice, and the numbers of it, made small enough to send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from osp_diag.analyses.summary.numbers import sink_rates
from osp_diag.errors import StoreError
from osp_diag.figures._decimate import bin_starts, max_pool
from osp_diag.monitoring.scalars import scalar
from osp_diag.runs.following import FollowedRun
from osp_diag.schema import KURTOSIS

__all__ = [
    "Choice",
    "Offer",
    "chosen",
    "curve",
    "extremes",
    "floor_of",
    "of_layers",
    "offered",
    "pooled_steps",
    "scalars",
    "sinks",
]

MOST_BINS = 300
"""Columns of a heat map, and half the points of a curve: about what a screen can tell apart."""
LARGEST, MEAN = "largest", "mean"
FIRST = (
    KURTOSIS,
    "fisher_kurtosis",
    "pooled_kurtosis",
    "neuron_kurtosis",
    "max_median_ratio",
    "absolute_maximum",
)
"""Statistics at the top of the list."""


@dataclass(frozen=True)
class Choice:
    """What the reader chose. It comes from a browser: every name is looked up in what the runs hold."""

    runs: tuple[int, ...]
    site: str = "residual_post"
    statistic: str = KURTOSIS
    stratum: str = "all"
    layer: str = LARGEST
    """``largest`` or ``mean`` over layers, or the number of one"""


@dataclass(frozen=True)
class Offer:
    """What there is to choose from, over all runs."""

    sites: list[str]
    statistics: list[str]
    strata: list[str]
    layers: list[int]


def offered(runs: Sequence[FollowedRun], choice: Choice) -> Offer:
    """Sites that hold the chosen statistic, statistics and strata of the chosen site, and its layers."""
    sites: dict[str, None] = {}
    statistics: dict[str, None] = {}
    strata: dict[str, None] = {}
    layers: set[int] = set()
    for run in runs:
        sites |= dict.fromkeys(run.sites_with(choice.statistic))
        statistics |= dict.fromkeys(
            name for name, dims in run.statistics_at(choice.site).items() if set(dims) <= {"layer", "stratum"}
        )
        with suppress(StoreError):  # of a damaged file, which the run's card tells
            strata |= dict.fromkeys(map(str, run.labels(choice.site, "stratum")))
            layers |= set(run.labels(choice.site, "layer").tolist())
    order = {name: place for place, name in enumerate(FIRST)}
    return Offer(
        list(sites),
        sorted(statistics, key=lambda name: (order.get(name, len(order)), name)),
        list(strata),
        sorted(layers),
    )


def chosen(run: FollowedRun, choice: Choice) -> xr.DataArray | None:
    """The chosen statistic (step, layer); None where the run does not hold it."""
    try:
        dims = run.statistics_at(choice.site).get(choice.statistic)
        if dims is None or not set(dims) <= {"layer", "stratum"}:
            return None
        select = {"stratum": choice.stratum} if "stratum" in dims else {}
        values = run.values(choice.site, choice.statistic, select)
    except StoreError:
        return None
    return values if values.size and values.dims == ("step", "layer") else None


def floor_of(values: xr.DataArray) -> float | None:
    """What noise scores; None where that is not above 0, or outliers score less (the channels in use)."""
    floor, ceiling = values.attrs.get("floor"), values.attrs.get("ceiling")
    if not isinstance(floor, int | float) or floor <= 0:
        return None
    return None if isinstance(ceiling, int | float) and ceiling < floor else float(floor)


def sinks(run: FollowedRun) -> xr.DataArray | None:
    """Sink rates (step, layer)."""
    values = sink_rates(run)
    return None if values is None or not values.size else values.transpose("step", "layer")


def scalars(run: FollowedRun, *names: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and those of the named scalars that were recorded; nothing where a file is damaged."""
    try:
        recorded = [name for name in names if name in run.series]
        return run.series["step"].values, {name.replace("_", " "): scalar(run, name) for name in recorded}
    except StoreError:
        return np.empty(0), {}


def of_layers(values: xr.DataArray, layer: str) -> Float[np.ndarray, " step"]:
    """One number a step: of the layer, or the largest or the mean over layers. NaN where there is none."""
    table = values.values
    if layer == MEAN:
        known = np.isfinite(table)
        total = np.where(known, table, 0.0).sum(axis=1)
        return np.where(known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), np.nan)
    if layer == LARGEST:
        return np.fmax.reduce(table, axis=1)
    places = np.flatnonzero(values["layer"].values.astype(str) == layer)
    return table[:, places[0]] if places.size else np.full(len(table), np.nan)


def pooled_steps(values: xr.DataArray) -> tuple[Int[np.ndarray, " bin"], Float[np.ndarray, "layer bin"]]:
    """First step of each bin, and the largest value in it by layer, so that no spike is lost."""
    steps = values["step"].values
    starts = bin_starts(len(steps), MOST_BINS)
    return steps[starts], max_pool(values.values, 0, MOST_BINS).T


def curve(steps: Iterable[Any], values: Float[np.ndarray, " step"]) -> tuple[np.ndarray, np.ndarray]:
    """Points that look like the whole curve: the smallest and the largest of each bin, where they are."""
    steps = np.asarray(steps)[: len(values)]
    kept = extremes(values, MOST_BINS)
    return steps[kept], values[kept]


def extremes(values: Float[np.ndarray, " step"], bins: int) -> Int[np.ndarray, " point"]:
    """Where the smallest and the largest value of each of ``bins`` runs are; all places if they are few.

    A bin without a number keeps its first place, so that the gap stays.
    """
    count = len(values)
    if count <= 2 * bins:
        return np.arange(count)
    width = -(-count // bins)
    padded = np.full(width * -(-count // width), np.nan)
    padded[:count] = values
    table = padded.reshape(-1, width)
    firsts = np.arange(len(table)) * width
    low = np.where(np.isnan(table), np.inf, table).argmin(axis=1)
    high = np.where(np.isnan(table), -np.inf, table).argmax(axis=1)
    return np.unique(np.concatenate([[0], firsts + low, firsts + high, [count - 1]]))
