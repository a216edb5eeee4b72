"""How large activations and their kurtosis grow with depth.

Above, or left: the three largest |x| of a layer's output and the median |x| (Sun et al. 2024, Fig. 1).
Below, or right: a kurtosis by stratum of tokens, between what Gaussian noise of that width gives (the
floor) and what a one-hot token gives (the ceiling).
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import UsageError
from osp_diag.figures._bounds import bound, draw_bounds, log_range
from osp_diag.figures._caption import caption
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import identifier, per_run, statistics
from osp_diag.figures.backend import Backend, Canvas, Dash, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of
from osp_diag.schema import ordinary_stratum

ALIASES = ("depth",)
REPORT = InReport("Where magnitudes grow", place=40)
GALLERY = InGallery(SMOLLM2, "Outliers appear in one layer and stay.", place=90)
ARRANGEMENTS = ("side-by-side", "overlaid")
_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted", "dashdot")

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    site: str = "residual_post",
    estimator: str = "osp_excess_kurtosis",
    arrange: str = "side-by-side",
    step: int | None = None,
) -> xr.Dataset:
    """Magnitudes and a kurtosis by layer.

    Parameters
    ----------
    site : where; ``residual_post`` is the output of each block
    estimator : a kurtosis with the dimension ``stratum``
    arrange : ``side-by-side`` (a column a run) or ``overlaid``; of one run they are the same
    step : of training; the last one by default

    Returns
    -------
    ``top_magnitude`` (run, layer, rank), ``median_magnitude`` (run, layer), ``kurtosis``
    (run, layer, stratum), ``floor`` and ``ceiling`` (run; NaN where the estimator has none).
    """
    if arrange not in ARRANGEMENTS:
        raise UsageError(f"depth_profile: arrange is {' or '.join(ARRANGEMENTS)}, not {arrange!r}")
    parts, steps, identifiers = [], [], []
    for run in runs:
        measured = statistics(
            run, site, ("top_magnitude", "median_magnitude", estimator), "depth_profile", step
        )
        if "stratum" not in measured[estimator].dims:
            raise UsageError(f"depth_profile: {estimator} has no strata; give an estimator that has them")
        attributes = measured[estimator].attrs
        identifiers.append(identifier(measured[estimator]))
        magnitudes = measured["top_magnitude"]
        part = xr.Dataset(
            {
                "top_magnitude": magnitudes.sel(stratum="all", drop=True)
                if "stratum" in magnitudes.dims
                else magnitudes,
                "median_magnitude": measured["median_magnitude"],
                "kurtosis": measured[estimator],
                "floor": bound(attributes, "floor"),
                "ceiling": bound(attributes, "ceiling"),
            }
        )
        parts.append(part)
        steps.append(step_of(run, step))
    dataset = per_run(parts, labels_of(runs, steps))
    title = f"Magnitude and kurtosis of {site} by layer"
    dataset.attrs = {
        "title": title,
        "caption": caption(
            title,
            runs,
            steps,
            [identifier(measured["top_magnitude"]), *identifiers],
        ),
        "site": site,
        "magnitude": identifier(measured["top_magnitude"]),
        "estimator": ", ".join(dict.fromkeys(identifiers)),
        "arrange": arrange,
    }
    return dataset


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Two panels for one run or overlaid runs; two rows of panels for runs side by side."""
    overlaid = dataset.attrs["arrange"] == "overlaid" and dataset.sizes["run"] > 1
    beside = dataset.sizes["run"] > 1 and not overlaid
    inches = style.widths[width]
    stacked = beside or inches < 5
    rows, columns = (2, dataset.sizes["run"] if beside else 1) if stacked else (1, 2)
    canvas = backend.canvas(rows, columns, width=inches, height=2.35 * rows, style=style, share_y=beside)
    values = [dataset[name].values for name in ("kurtosis", "floor", "ceiling")]
    log = bool((dataset["kurtosis"].min() >= 0).item())
    low, high = log_range(*values) if log else (None, None)
    if low is not None:
        dataset = dataset.assign(kurtosis=dataset["kurtosis"].clip(min=low))
    for column in range(columns if beside else 1):
        part = dataset.isel(run=[column]) if beside else dataset
        magnitude = canvas.panel(
            0,
            column,
            title=str(part["run"].values[0]) if beside else "Magnitude",
            subtitle="top 1 solid, median dotted" if overlaid else "",
            x_label="" if stacked else "layer",
            y_scale="log",
            y_label="" if column else f"|x| of {dataset.attrs['site']}\n{dataset.attrs['magnitude']}",
        )
        kurtosis = canvas.panel(
            *((1, column) if stacked else (0, 1)),
            title="" if beside else "Kurtosis of a token, mean",
            subtitle="all tokens solid, rest dashed" if overlaid else "",
            x_label="layer",
            y_label="" if column else dataset.attrs["estimator"],
            y_scale="log" if log else "linear",
        )
        (_overlaid if overlaid else _single)(part, magnitude, kurtosis, style)
        draw_bounds(kurtosis, part["floor"].values, part["ceiling"].values, floor="Gaussian floor")
        if low is not None and high is not None:
            kurtosis.limits("y", low, high)
        if not beside and not overlaid:
            magnitude.legend()
            kurtosis.legend()
    if overlaid:
        canvas.legend(magnitude)
    elif beside:  # columns of several runs are too narrow for legends of their own
        canvas.legend(magnitude, kurtosis)
    return canvas


def _single(dataset: xr.Dataset, magnitude: Panel, kurtosis: Panel, style: Style) -> None:
    part = dataset.isel(run=0)
    layers = part["layer"].values.astype(float)
    for index, rank in enumerate(part["rank"].values):
        magnitude.line(
            layers,
            part["top_magnitude"].sel(rank=rank).values,
            label=f"top {int(rank)}",
            colour=style.palette[index],
            dash=_DASHES[index],
        )
    magnitude.line(layers, part["median_magnitude"].values, label="median", colour=style.grey)
    for index, stratum in enumerate(part["stratum"].values):
        values = part["kurtosis"].sel(stratum=stratum).values
        if np.isfinite(values).any():
            kurtosis.line(
                layers,
                values,
                label=f"{stratum} tokens" if stratum == "all" else str(stratum),
                colour=style.palette[index % len(style.palette)],
                dash=_DASHES[index % len(_DASHES)],
            )


def _overlaid(dataset: xr.Dataset, magnitude: Panel, kurtosis: Panel, style: Style) -> None:
    colours = style.colours_of_runs(dataset.sizes["run"])
    layers = dataset["layer"].values.astype(float)
    for index, run in enumerate(dataset["run"].values):
        part = dataset.isel(run=index)
        colour = colours[index]
        magnitude.line(layers, part["top_magnitude"].sel(rank=1).values, label=str(run), colour=colour)
        magnitude.line(layers, part["median_magnitude"].values, label="", colour=colour, dash="dotted")
        kurtosis.line(layers, part["kurtosis"].sel(stratum="all").values, label=str(run), colour=colour)
        ordinary = part["kurtosis"].sel(stratum=ordinary_stratum(map(str, part["stratum"].values)))
        kurtosis.line(layers, ordinary.values, label="", colour=colour, dash="dashed")
