"""When, where and by whom outliers are written while a model trains, and in which channels."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.hot import TOP, hot_channels
from osp_diag.analyses.channels.profiles import HOT
from osp_diag.analyses.emergence.onset import DEPARTURE, FEWEST_PROBES, SeriesEmergence, emergence_of_series
from osp_diag.analyses.emergence.text import text_of
from osp_diag.analyses.emergence.writers import outlier_writers
from osp_diag.analyses.in_notebook import in_notebook
from osp_diag.analyses.run_labels import run_name
from osp_diag.analyses.thinned_run import evenly, thinned_run
from osp_diag.errors import OspDiagError, StoreError, UsageError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.runs.run import Run
from osp_diag.schema import KURTOSIS, network_order

__all__ = ["KURTOSIS", "SITES", "Emergence", "log_kurtosis", "onsets"]

SITES = (
    "embedding", "attention_contribution", "residual_mid", "mlp_contribution", "residual_post", "final_norm",
)  # fmt: skip
"""The residual stream and what is added to it: near-Gaussian at initialisation, so noise is the floor."""
MOST_PROBES = 256
"""Of longer series so many probes are looked at."""

_NUMBERS = {
    "onset": ("step", "first probed step that can be told from noise, of the rise to the departure"),
    "growth_start": ("step", "where the line of growth, carried back, meets the noise before the onset"),
    "doubling_time": ("step", "ln 2 / slope of ln κ from the onset to the plateau"),
    "plateau": ("1", "kurtosis on the plateau; NaN while it still grows"),
}


@dataclass(frozen=True)
class Emergence:
    """The answers, as labelled arrays; ``as_text`` says them in a few sentences."""

    onsets: xr.Dataset
    """by site, layer and stratum: see :func:`onsets`"""
    first: xr.Dataset
    """by stratum: the first site and layer to depart"""
    channels: xr.Dataset | None
    """see :func:`osp_diag.analyses.channels.hot.hot_channels`; None: the run holds no channel statistics"""
    writers: xr.Dataset | None
    """see :func:`osp_diag.analyses.emergence.writers.outlier_writers`"""
    notes: tuple[str, ...] = ()
    """what could not be answered, and why"""

    def as_text(self) -> str:
        """A few sentences."""
        return text_of(self)

    def _repr_html_(self) -> str:
        return in_notebook(self.as_text())


def trace_emergence(
    run: Run,
    *,
    sites: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    departure: float = DEPARTURE,
    draws: int = 100,
    top: int = TOP,
    times: float = HOT,
    probes: int = MOST_PROBES,
    channel_probes: int | None = None,
) -> Emergence:
    """When outliers emerge in a training run, where first, who wrote them and in which channels.

    Parameters
    ----------
    sites, strata, departure, draws, probes : see :func:`onsets`
    top, times : see :func:`osp_diag.analyses.channels.hot.hot_channels`
    channel_probes : channels and their writers are looked at in so many probed steps at most, evenly
        spaced, and at the onsets of block outputs; all by default

    Raises
    ------
    UsageError, StoreError : as :func:`onsets`. What else the run lacks is said in ``notes``.
    """
    onset_data = onsets(run, sites=sites, strata=strata, departure=departure, draws=draws, probes=probes)
    notes, channels, writers = [], None, None
    try:
        short = run if channel_probes is None else _short(run, onset_data, channel_probes)
        channels = hot_channels(short, top=top, times=times)
        writers = outlier_writers(short, top=top)
    except StoreError as problem:
        notes.append(str(problem))
    if writers is not None and writers.attrs["unknown"]:
        notes.append(f"whether attention or the MLP wrote them can't be told: {writers.attrs['unknown']}")
    return Emergence(onset_data, _first(onset_data), channels, writers, tuple(notes))


def _short(run: Run, onset_data: xr.Dataset, probes: int) -> Run:
    """The run at few steps, among them each stratum's first onset, with its channels in memory."""
    onset = onset_data["onset"].sel(site=onset_data["site"] == "residual_post").values
    # The first onset in any layer, by stratum; infinite where none departs.
    firsts = np.fmin.reduce(onset.reshape(-1, onset.shape[-1]), axis=0, initial=np.inf)
    short = thinned_run(run, probes, always=firsts[np.isfinite(firsts)].astype(int).tolist())
    nodes = {"/": short.tree.to_dataset()}
    for site in ("residual_pre", *SITES):
        if site in short.sites and "channel_rms" in short.at(site):
            nodes[site] = short.at(site)[["channel_rms"]].load()  # once, and not again for each layer
    return Run(xr.DataTree.from_dict(nodes))


def onsets(
    run: Run,
    *,
    sites: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    departure: float = DEPARTURE,
    level: float = 0.9,
    draws: int = 100,
    seed: int = 0,
    probes: int = MOST_PROBES,
) -> xr.Dataset:
    """Onset, doubling time and plateau of the OSP kurtosis at every site, layer and stratum.

    :mod:`osp_diag.analyses.emergence.onset` defines them, for y = max(ln(κ / noise), 0). The noise is the
    estimator's floor (Gaussian noise of that width); at ``mlp_hidden``, a product that is not Gaussian even
    untrained, the value at step 0 if that is larger.

    Parameters
    ----------
    sites : by default those of :data:`SITES` that the run holds
    strata : by default all that the run holds
    departure : the multiple of the noise that κ has to reach
    level : of the intervals
    draws : of the bootstrap, per series
    probes : longer series are thinned evenly to so many; an onset is then known to one of these

    Returns
    -------
    ``onset``, ``growth_start``, ``doubling_time``, ``plateau``, each with ``_low`` and ``_high``;
    ``plateau_step``; ``state``: "noise" (never departs), "onset", "from the start" (above at the first probe:
    the onset is not later than that), "unknown" (too few probes with tokens of that stratum) or "" (no such
    layer); ``agreement``: the share of draws with an onset; ``raised_at_end``. Dimensions (site, layer,
    stratum).

    Raises
    ------
    UsageError : a parameter out of range
    StoreError : the run holds fewer than five probed steps, or no kurtosis at those sites
    """
    if departure <= 1 or not 0 < level < 1 or draws < 0:
        raise UsageError(
            f"onsets: departure is above 1, level between 0 and 1, draws not negative; got {departure:g}, "
            f"{level:g} and {draws}"
        )
    steps = np.asarray(run.steps, dtype=np.float64)
    if len(steps) < FEWEST_PROBES:
        raise StoreError(
            f"onsets: the run of {run_name(run)} holds {len(steps)} probed steps, and a change over training "
            f"takes {FEWEST_PROBES}; probe more often, or let it train on"
        )
    values = log_kurtosis(run, sites=sites)
    available = [str(name) for name in values["stratum"].values]
    foreign = [name for name in strata or () if name not in available]
    if foreign:
        raise UsageError(
            f"onsets: there is no stratum {', '.join(foreign)}; there are {', '.join(available)}"
        )
    values = values.sel(stratum=available if strata is None else list(strata))
    places = evenly(len(steps), probes)
    values = values.transpose("site", "layer", "stratum", "step").isel(step=places)
    emergences = np.empty(values.shape[:-1], dtype=object)
    for place in np.ndindex(emergences.shape):
        if np.isnan(values["noise"].values[place[:2]]):
            continue
        label = "/".join(str(values[dim].values[i]) for dim, i in zip(values.dims, place, strict=False))
        # A seed of each series' own, from its label: a series has the same interval whatever is beside it.
        emergences[place] = emergence_of_series(
            steps[places],
            np.maximum(values.values[place], 0.0),
            departure=departure,
            level=level,
            draws=draws,
            seed=seed + zlib.crc32(label.encode()),
        )
    dataset = _labelled(emergences, values)
    dataset.attrs = {
        "statistic": str(values.attrs["estimator"]),
        "departure": departure,
        "level": level,
        "draws": draws,
        "first_probe": float(steps[0]),
        "last_probe": float(steps[-1]),
        "model": run_name(run),
        "change_points": "ruptures KernelCPD (linear kernel), penalty 3 σ² ln n",
    }
    return dataset


def log_kurtosis(run: Run, *, sites: Sequence[str] | None = None) -> xr.DataArray:
    """ln(κ / noise) of the OSP kurtosis, (site, step, layer, stratum), and the coordinate ``noise``.

    ``noise`` is (site, layer). 0 of κ is −∞; a layer that a site lacks is NaN, in ``noise`` too.

    Raises
    ------
    StoreError : a site is not in the run or holds no kurtosis there, or none of the default ones does
    """
    parts = []
    for site in SITES if sites is None else sites:
        try:
            parts.append(_of_site(run, site))
        except (OspDiagError, KeyError):
            if sites is not None:
                raise StoreError(
                    f"onsets: the run of {run_name(run)} holds no {KURTOSIS} at {site!r}; it has the sites "
                    f"{', '.join(run.sites)}"
                ) from None
    if not parts:
        raise StoreError(
            f"onsets: the run of {run_name(run)} holds {KURTOSIS} at none of {', '.join(SITES)}; probe "
            "with the estimator and one of these sites"
        )
    return xr.concat(
        parts, "site", join="outer", coords="different", compat="equals", combine_attrs="override"
    )


def _of_site(run: Run, site: str) -> xr.DataArray:
    kurtosis = run.at(site)[KURTOSIS].transpose("step", "layer", "stratum").load()
    # A closed form, not a simulation: docs/decisions.md, Estimators.
    floor = kurtosis.attrs.get("floor") or gaussian_floor(int(run.attrs["hidden_size"]))
    noise = np.full(kurtosis.sizes["layer"], float(floor))
    if site == "mlp_hidden" and kurtosis["step"].values[0] == 0:
        noise = np.fmax(noise, kurtosis.isel(step=0).sel(stratum="all").values)
    with np.errstate(divide="ignore"):
        # κ of 0 gives −∞, which counts as noise: the estimator of the OSP script is cut off at 0.
        values = np.log(kurtosis.values / noise[:, None])
    return xr.DataArray(
        values[None],
        dims=("site", "step", "layer", "stratum"),
        coords={
            "site": [site],
            "step": kurtosis["step"].values,
            "layer": kurtosis["layer"].values,
            "stratum": [str(name) for name in kurtosis["stratum"].values],
            "noise": (("site", "layer"), noise[None]),
        },
        attrs={
            "estimator": kurtosis.attrs.get("estimator", KURTOSIS),
            "units": "1",
            "definition": "ln(κ / noise)",
        },
    )


def _labelled(emergences: np.ndarray, values: xr.DataArray) -> xr.Dataset:
    """Objects by place as arrays. Of a plateau, y becomes a kurtosis again."""
    dims = ("site", "layer", "stratum")

    def of(field: str, index: int | None = None, nothing: Any = np.nan) -> np.ndarray:
        values = [nothing] * emergences.size
        for place, emergence in enumerate(emergences.ravel()):
            if isinstance(emergence, SeriesEmergence):
                value = getattr(emergence, field)
                values[place] = value if index is None else value[index]
        return np.array(values).reshape(emergences.shape)

    noise = values["noise"].transpose("site", "layer").values[..., None]
    dataset = xr.Dataset(coords={dim: values[dim].values for dim in dims})
    for name, (units, definition) in _NUMBERS.items():
        source = {"doubling_time": "doubling", "growth_start": "start"}.get(name, name)
        for index, end in enumerate(("", "_low", "_high")):
            array = of(source, index)
            # y = ln(κ / noise), so κ = noise · exp(y).
            array = noise * np.exp(array) if name == "plateau" else array
            text = (
                f"{'lower' if end == '_low' else 'upper'} end of the interval of {name}"
                if end
                else definition
            )
            dataset[name + end] = (dims, array, {"units": units, "definition": text})
    dataset["plateau_step"] = (dims, of("plateau_step"), {"units": "step", "definition": "where growth ends"})
    dataset["agreement"] = (
        dims,
        of("agreement"),
        {"units": "1", "definition": "share of draws with an onset"},
    )
    dataset["raised_at_end"] = (dims, of("raised_at_end", nothing=False).astype(bool))
    dataset["raised_at_end"].attrs["definition"] = "still above the departure at the last probe"
    dataset["state"] = (dims, of("state", nothing="").astype(str), {"definition": "what became of it"})
    return dataset


def _first(onset_data: xr.Dataset) -> xr.Dataset:
    """The first place to depart in each stratum: by onset, then by the way of the data; and its rivals.

    ``rivals`` names the other places whose intervals begin no later than the first one's ends.
    """
    sites, layers, steps, rivals = [], [], [], []
    for stratum in onset_data["stratum"].values:
        part = onset_data.sel(stratum=stratum)
        onset = {
            (str(site), int(layer)): float(part["onset"].sel(site=site, layer=layer))
            for site in part["site"].values
            for layer in part["layer"].values
        }
        departed = [place for place in network_order(onset) if np.isfinite(onset[place])]
        first = min(departed, key=lambda place: onset[place], default=None)
        sites.append(first[0] if first else "")
        layers.append(float(first[1]) if first else np.nan)
        steps.append(onset[first] if first else np.nan)
        late = float(part["onset_high"].sel(site=first[0], layer=first[1])) if first else np.nan
        # Rivals may have departed first, too: their intervals begin before the first one's ends.
        rivals.append(
            ", ".join(
                f"{site} {layer}"
                for site, layer in departed
                if (site, layer) != first and float(part["onset_low"].sel(site=site, layer=layer)) < late
            )
        )
    return xr.Dataset(
        {
            "site": ("stratum", np.array(sites, dtype=str), {"definition": "first site to leave the noise"}),
            "layer": ("stratum", layers, {"definition": "its layer; NaN if none departs"}),
            "step": ("stratum", steps, {"units": "step", "definition": "its onset"}),
            "rivals": (
                "stratum",
                np.array(rivals, dtype=str),
                {"definition": "places whose intervals overlap with the first one's"},
            ),
        },
        coords={"stratum": onset_data["stratum"].values},
    )
