"""The data of the charts that answer to a step, a layer and a head: profiles, channels, sinks.

A page holds a chosen number of steps as they are, so that a slider shows what was measured; what lies
between two of them is in the course over training, which is max-pooled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.profiles import relative_rms
from osp_diag.analyses.summary.numbers import sink_rate_at
from osp_diag.analyses.thinned_run import evenly
from osp_diag.errors import OspDiagError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.figures._decimate import bin_starts, max_pool
from osp_diag.figures.report.encoding import packed, packed_log
from osp_diag.runs.run import Run
from osp_diag.schema import SINK_EPSILON, ordinary_stratum

__all__ = ["STATISTICS", "explorer_data"]

STATISTICS = (
    "osp_excess_kurtosis", "fisher_kurtosis", "max_median_ratio", "absolute_maximum",
    "massive_activation_count", "participation_ratio",
)  # fmt: skip
"""What the profile by layer can show, if it is measured by layer and stratum."""
SITES = (
    "residual_post", "residual_mid", "embedding", "final_norm", "attention_input", "mlp_input",
    "attention_contribution", "mlp_contribution", "mlp_hidden",
)  # fmt: skip
"""Where; the first that a run holds is shown first."""
CHANNEL_SITE = "residual_post"
UNPOOLED, COLUMNS = 128, 96
"""Channels that a map has room for one by one; columns of wider ones, whose channels are pooled by their
maximum. The channel that has it is kept."""
BUDGET = 380_000
"""Numbers that all maps and profiles of a page may hold: some two megabytes."""
FEWEST_STEPS = 12
COURSE = 200
"""Columns of the course over training."""


def explorer_data(runs: list[Run], labels: list[str]) -> list[dict[str, Any]]:
    """One dictionary a run, ready for JSON; arrays are packed.

    Each has ``label``, ``steps`` (those of the slider), ``step_count``, and ``profiles``, ``channels``,
    ``sinks``, ``course`` where the run holds them (else they are left out).
    """
    cells = sum(_cells_per_step(run) for run in runs)
    # As many steps as the page's budget holds.
    most = max(FEWEST_STEPS, BUDGET // max(cells, 1))
    return [_of_run(run, label, most) for run, label in zip(runs, labels, strict=True)]


def _statistics_at(run: Run, site: str) -> dict[str, xr.DataArray]:
    """Those of a site that are by step, layer and stratum."""
    if site not in run.sites:
        return {}
    dataset = run.at(site)
    return {
        name: dataset[name]
        for name in STATISTICS
        if name in dataset and set(dataset[name].dims) == {"step", "layer", "stratum"}
    }


def _cells_per_step(run: Run) -> int:
    profiles = sum(values[0].size for site in SITES for values in _statistics_at(run, site).values())
    channels = 0
    if CHANNEL_SITE in run.sites and "channel_rms" in run.at(CHANNEL_SITE):
        sizes = run.at(CHANNEL_SITE)["channel_rms"].sizes
        channels = (
            sizes["layer"]
            * _columns(sizes["channel"])
            * len(_channel_strata(run.at(CHANNEL_SITE)["channel_rms"]))
        )
    return profiles + channels


def _of_run(run: Run, label: str, most: int) -> dict[str, Any]:
    places = evenly(len(run.steps), most)
    highest = _highest_step(run)
    places = places if highest is None else np.union1d(places, highest)
    parts = {
        "channels": _channels(run, places),
        "sinks": _sinks(run, places),
        "course": _course(run) if len(places) < len(run.steps) else None,
    }
    return {
        "label": label,
        "steps": [int(step) for step in run.steps[places]],
        "step_count": len(run.steps),
        "profiles": _profiles(run, places),
        **{name: part for name, part in parts.items() if part is not None},
    }


def _highest_step(run: Run) -> int | None:
    """The place of the step with the highest kurtosis, which no thinning may lose."""
    values = _statistics_at(run, CHANNEL_SITE).get("osp_excess_kurtosis")
    if values is None or len(run.steps) < 3:
        return None
    by_step = values.max(("layer", "stratum")).values
    return int(np.nanargmax(by_step)) if np.isfinite(by_step).any() else None


def _profiles(run: Run, places: np.ndarray) -> list[dict[str, Any]]:
    """One entry a site, the sites in the order of :data:`SITES`."""
    profiles = []
    for site in SITES:
        statistics = _statistics_at(run, site)
        if not statistics:
            continue
        first = next(iter(statistics.values()))
        entry: dict[str, Any] = {
            "site": site,
            "layers": [int(layer) for layer in first["layer"].values],
            "strata": [str(stratum) for stratum in first["stratum"].values],
            "statistics": {},
        }
        for name, values in statistics.items():
            at = values.isel(step=places).transpose("step", "layer", "stratum").load()
            entry["statistics"][name] = packed(at.values) | _bounds(run, name, values)
        profiles.append(entry)
    return profiles


def _bounds(run: Run, name: str, values: xr.DataArray) -> dict[str, Any]:
    """Floor and ceiling, and what determines the numbers."""
    attrs = values.attrs
    entry: dict[str, Any] = {"estimator": str(attrs.get("estimator", name))}
    for bound in ("floor", "ceiling"):
        if isinstance(attrs.get(bound), int | float) and np.isfinite(attrs[bound]):
            entry[bound] = float(attrs[bound])
    if name == "osp_excess_kurtosis" and "floor" not in entry and run.attrs.get("hidden_size"):
        entry["floor"] = gaussian_floor(int(run.attrs["hidden_size"]))
    return entry


def _channels(run: Run, places: np.ndarray) -> dict[str, Any] | None:
    """RMS of channels over that of their layer's median channel, max-pooled, and which channel it is of."""
    if CHANNEL_SITE not in run.sites or "channel_rms" not in run.at(CHANNEL_SITE):
        return None
    rms = run.at(CHANNEL_SITE)["channel_rms"].transpose("step", "stratum", "layer", "channel")
    strata = _channel_strata(rms)
    ratios, channels = [], []
    for place in places:  # step by step, because one can be megabytes
        ratio, channel = _pooled(rms.isel(step=int(place)).sel(stratum=strata).values)
        ratios.append(ratio)
        channels.append(channel)
    return {
        "site": CHANNEL_SITE,
        "layers": [int(layer) for layer in rms["layer"].values],
        "strata": strata,
        "width": rms.sizes["channel"],
        "ratio": packed_log(np.stack(ratios)),
        "channel": packed(np.stack(channels)),
    }


def _channel_strata(values: xr.DataArray) -> list[str]:
    """All tokens and the ordinary ones, of which maps are drawn."""
    strata = [str(name) for name in values["stratum"].values]
    return [name for name in strata if name in ("all", ordinary_stratum(strata))]


def _columns(width: int) -> int:
    return width if width <= UNPOOLED else COLUMNS


def _pooled(rms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(stratum, layer, channel) → the largest ratio of each bin of channels, and its channel."""
    ratio = relative_rms(np.abs(rms.astype(np.float64)))
    width = ratio.shape[-1]
    starts = bin_starts(width, _columns(width))
    pooled = max_pool(ratio, ratio.ndim - 1, _columns(width))
    # The channel of each bin's maximum, counted from the first channel of all.
    ends = np.append(starts[1:], width)
    bins = [
        np.nan_to_num(ratio[..., a:b], nan=-1.0).argmax(-1) + a for a, b in zip(starts, ends, strict=True)
    ]
    return pooled, np.stack(bins, axis=-1)


def _sinks(run: Run, places: np.ndarray) -> dict[str, Any] | None:
    """Sink rates by head at the first position."""
    if "attention" not in run.sites or "sink_rate" not in run.at("attention"):
        return None
    rate = sink_rate_at(run.at("attention")["sink_rate"])
    if rate is None:
        return None
    rate = rate.transpose("step", "layer", "head")
    values = rate.isel(step=places).values
    if not np.isfinite(values).any():
        return None
    return {
        "layers": [int(layer) for layer in rate["layer"].values],
        "heads": rate.sizes["head"],
        "epsilon": SINK_EPSILON,
        "rate": packed(values),
    }


def _course(run: Run) -> dict[str, Any] | None:
    """Statistics of block outputs at every probed step, neighbouring steps pooled by their maximum."""
    statistics = _statistics_at(run, CHANNEL_SITE)
    if not statistics:
        return None
    starts = bin_starts(len(run.steps), COURSE)
    first = next(iter(statistics.values()))
    strata, pooled = _channel_strata(first), {}
    for name, values in statistics.items():
        try:
            whole = values.sel(stratum=strata).transpose("stratum", "layer", "step").values
        except (KeyError, OspDiagError):
            return None
        pooled[name] = packed(max_pool(whole, 2, COURSE))
    return {
        "site": CHANNEL_SITE,
        "steps": [int(step) for step in run.steps[starts]],
        "strata": strata,
        "layers": [int(layer) for layer in first["layer"].values],
        "statistics": pooled,
    }
