"""One model under every kurtosis: how far published definitions disagree.

"Kurtosis" is at least seven numbers. Left, or above: each of them by layer, or by site. Right, or below:
where its values lie between its floor (what noise scores) and its ceiling (the largest possible).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._bounds import bound
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import sample
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import nothing_finite, per_run
from osp_diag.figures.backend import Backend, Canvas, Dash, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("disagreement",)
REPORT = InReport("What other definitions of kurtosis say", place=110)
GALLERY = InGallery(SMOLLM2, "One model under every number that is called kurtosis.", place=110)
BY = ("layer", "site")
_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted", "dashdot", "dotted", "dashed", "dashdot")
"""One solid line, the undermost: what lies over it lets it through."""

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    site: str = "residual_post",
    stratum: str = "all",
    by: str = "layer",
    step: int | None = None,
) -> xr.Dataset:
    """Every kurtosis that the runs hold.

    A kurtosis is the output of the name of its estimator, where the estimator's title says that it is one
    and the output has strata. So an estimator added later is found.

    Parameters
    ----------
    site : where, if by layer
    stratum : of which tokens
    by : ``layer`` of one site, or ``site``: the mean over the layers of each site
    step : of training; the last one by default

    Returns
    -------
    ``kurtosis``, ``floor`` and ``ceiling`` (run, estimator, place), where ``place`` is a layer or a site;
    NaN where there is none. ``estimator`` is the identifier.

    Raises
    ------
    StoreError : a run that holds no kurtosis there
    """
    if by not in BY:
        raise UsageError(f"estimator_disagreement: by is {' or '.join(BY)}, not {by!r}")
    steps = [step_of(run, step) for run in runs]
    parts = [_of_run(run, at, site, stratum, by) for run, at in zip(runs, steps, strict=True)]
    dataset = per_run(parts, labels_of(runs, steps))
    # Joined runs come sorted by name; the order of the first run's places is that of the network.
    order = list(dict.fromkeys(place for part in parts for place in part["place"].values.tolist()))
    dataset = dataset.sel(place=order if by == "site" else sorted(order))
    where = f"of {site} by layer" if by == "layer" else "by site, mean over layers"
    title = f"Every kurtosis {where}"
    remarks = [
        f"Tokens: {stratum}",
        "Grey: from the floor (what noise, or equal channels, score) to the ceiling (the largest possible); "
        "from the edge where the floor is 0 or less, to the edge where there is no ceiling",
        "Values below an axis are drawn at its foot",
    ]
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, [str(e) for e in dataset["estimator"].values], remarks),
        "by": by,
    }
    return dataset


def _of_run(run: Run, step: int, site: str, stratum: str, by: str) -> xr.Dataset:
    """Every kurtosis by place, with its floor and ceiling there."""
    sites = [site] if by == "layer" else run.sites
    if site not in run.sites:
        reason = run.absent_sites.get(site)
        raise StoreError(
            f"estimator_disagreement: the run of {model_name(run.attrs)} holds no site {site!r}"
            + (f" ({reason})" if reason else f"; it has {', '.join(run.sites)}")
        )
    parts = []
    for place in sites:
        kurtoses = _kurtoses(run, place, step, stratum)
        if not kurtoses:
            continue
        if by == "layer":
            layers = next(iter(kurtoses.values()))["layer"].values
            parts += [_at(kurtoses, layer, int(layer)) for layer in layers]
        else:
            parts.append(_at(kurtoses, None, place))
    if not parts:
        raise StoreError(
            f"estimator_disagreement: the run of {model_name(run.attrs)} holds no kurtosis at {site!r}; "
            "probe again with osp_excess_kurtosis and others among --estimators"
        )
    whole = xr.concat(parts, "place", join="outer", data_vars="all", coords="minimal", compat="override")
    if not np.isfinite(whole["kurtosis"].values).any():
        raise StoreError(nothing_finite(run, f"every kurtosis at {site!r}", "estimator_disagreement"))
    return whole


def _kurtoses(run: Run, site: str, step: int, stratum: str) -> dict[str, xr.DataArray]:
    """Main output (layer) of every estimator of a kurtosis, by identifier."""
    kurtoses: dict[str, xr.DataArray] = {}
    dataset = run.at(site)
    for name in dataset.data_vars:
        values = dataset[name]
        estimator = str(values.attrs.get("estimator", ""))
        title = str(values.attrs.get("long_name", estimator)).lower()
        if estimator.partition("/")[0] != name or "kurtosis" not in title:
            continue
        if set(values.dims) - {"step"} != {"layer", "stratum"}:
            continue
        strata = [str(label) for label in values["stratum"].values]
        if stratum not in strata:
            raise UsageError(
                f"estimator_disagreement: stratum is one of {', '.join(strata)}, not {stratum!r}"
            )
        values = values.sel(stratum=stratum, drop=True)
        kurtoses[estimator] = (values.sel(step=step) if "step" in values.dims else values).load()
    return dict(sorted(kurtoses.items()))


def _at(kurtoses: dict[str, xr.DataArray], layer: Any, place: Any) -> xr.Dataset:
    """All of them at one layer, or their mean over layers."""
    columns = {
        "kurtosis": [
            float(values.mean("layer") if layer is None else values.sel(layer=layer))
            for values in kurtoses.values()
        ],
        **{end: [bound(values.attrs, end) for values in kurtoses.values()] for end in ("floor", "ceiling")},
    }
    return xr.Dataset(
        {name: ("estimator", values) for name, values in columns.items()},
        coords={"estimator": list(kurtoses)},
    ).expand_dims(place=[place])


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A row a run: its numbers, and their place between floor and ceiling."""
    inches, runs = style.widths[width], dataset.sizes["run"]
    stacked = inches < 5
    rows, columns = (2 * runs, 1) if stacked else (runs, 2)
    height = 2.9 if dataset.attrs["by"] == "layer" else 3.8  # names of sites stand upright
    canvas = backend.canvas(rows, columns, width=inches, height=height * rows, style=style)
    names = [str(name) for name in dataset["estimator"].values]
    colours = sample("batlow", len(names), 0.02, 0.8)
    low, high = _range(dataset)
    left = []
    for run in range(runs):
        part = dataset.isel(run=run)
        last = run == runs - 1
        lines = canvas.panel(
            2 * run if stacked else run,
            0,
            title=str(part["run"].item()),
            x_label=dataset.attrs["by"] if last or stacked else "",
            y_label="kurtosis",
            y_scale="log",
        )
        _lines(lines, part, names, colours, low)
        lines.limits("y", low, high)
        ranges = canvas.panel(
            *((2 * run + 1, 0) if stacked else (run, 1)),
            x_label="kurtosis, floor and ceiling" if last or stacked else "",
            x_scale="log",
        )
        _ranges(ranges, part, colours, low, high, style.grey)
        ranges.ticks("y", range(len(names)), [name.partition("/")[0] for name in names])
        ranges.limits("y", len(names) - 0.5, -0.5)
        ranges.limits("x", low, high)
        left.append(lines)
    canvas.legend(left[0])
    return canvas


def _range(dataset: xr.Dataset) -> tuple[float, float]:
    """Ends of the logarithmic axes."""
    numbers = np.concatenate([np.ravel(dataset[name].values) for name in ("kurtosis", "floor", "ceiling")])
    positive = numbers[np.isfinite(numbers) & (numbers > 0)]
    if not positive.size:
        return 0.1, 10.0
    return float(positive.min()) / 2, float(positive.max()) * 2


def _lines(panel: Panel, part: xr.Dataset, names: list[str], colours: list[str], low: float) -> None:
    places = part["place"].values
    sites = places.dtype.kind not in "if"
    x = np.arange(len(places)).astype(float) if sites else places.astype(float)
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        values = part["kurtosis"].sel(estimator=name).values
        if np.isfinite(values).any():
            panel.line(
                x,
                np.maximum(values, low),
                label=name,
                colour=colour,
                dash=_DASHES[index % len(_DASHES)],
            )
    if sites:
        panel.ticks("x", x.tolist(), [str(place) for place in places])


def _ranges(panel: Panel, part: xr.Dataset, colours: list[str], low: float, high: float, grey: str) -> None:
    by = part.attrs["by"]
    for row, colour in enumerate(colours):
        values, floors, ceilings = (
            part[name].isel(estimator=row).values for name in ("kurtosis", "floor", "ceiling")
        )
        measured = np.isfinite(values)
        if not measured.any():
            continue
        # Where there is no floor above 0, or no ceiling, the range goes to the edge of the panel.
        floor = np.nanmin(floors) if np.isfinite(floors).any() else low
        ceiling = np.nanmax(ceilings) if np.isfinite(ceilings).any() else high
        panel.line(
            np.array([max(floor, low), ceiling]), np.array([row, row], dtype=float), label="", colour=grey
        )
        panel.scatter(
            np.maximum(values[measured], low),
            np.full(int(measured.sum()), row, dtype=float),
            label="",
            colour=colour,
            texts=[f"{by} {place}" for place in part["place"].values[measured]],
        )
