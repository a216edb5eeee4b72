"""Which tokens make a model's outliers: kurtosis and max/median by layer, of all tokens and of each stratum.

A massive activation lives on the first token alone, an outlier channel on every token. ``all`` cannot tell
them apart; ``first`` beside ``rest`` can.
"""

from __future__ import annotations

from typing import Any

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

ALIASES = ("strata",)
REPORT = InReport(linked_charts=True)
GALLERY = InGallery(SMOLLM2, "First token, delimiters and all others are told apart.", place=100)
_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted", "dashdot")
_STATISTICS = ("kurtosis", "ratio")

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    site: str = "residual_post",
    estimator: str = "osp_excess_kurtosis",
    ratio: str = "max_median_ratio",
    step: int | None = None,
) -> xr.Dataset:
    """A kurtosis and a ratio of the largest to the typical activation, by layer and stratum.

    Parameters
    ----------
    site : where
    estimator, ratio : what the two panels show; both need the dimension ``stratum``
    step : of training; the last one by default

    Returns
    -------
    ``kurtosis`` and ``ratio`` (run, layer, stratum), NaN where a stratum has no tokens; ``kurtosis_floor``,
    ``kurtosis_ceiling``, ``ratio_floor``, ``ratio_ceiling`` (run), NaN where there is none.
    """
    names = dict(zip(_STATISTICS, (estimator, ratio), strict=True))
    parts, steps = [], []
    for run in runs:
        measured = statistics(run, site, tuple(names.values()), "stratum_comparison", step)
        for name in names.values():
            dims = measured[name].dims
            if set(dims) != {"layer", "stratum"}:
                raise UsageError(
                    f"stratum_comparison: {name} has the dimensions {', '.join(map(str, dims))}; "
                    "give a statistic by layer and stratum"
                )
        variables: dict[str, Any] = {}
        for kind, name in names.items():
            variables[kind] = measured[name].transpose("layer", "stratum")
            for end in ("floor", "ceiling"):
                variables[f"{kind}_{end}"] = bound(measured[name].attrs, end)
        parts.append(xr.Dataset(variables))
        steps.append(step_of(run, step))
    labels = {kind: identifier(measured[name]) for kind, name in names.items()}
    dataset = per_run(parts, labels_of(runs, steps))
    title = f"Kurtosis and largest activation of {site} by stratum of tokens"
    remark = "Strata: first tokens of the sequences, delimiters, the rest; all is their union"
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, list(labels.values()), [remark]),
        **labels,
    }
    return dataset


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Both statistics of one run side by side; of several, a column a run."""
    runs, inches = dataset.sizes["run"], style.widths[width]
    stacked = runs > 1 or inches < 5
    rows, columns = (2, runs) if stacked else (1, 2)
    canvas = backend.canvas(rows, columns, width=inches, height=2.35 * rows, style=style, share_y=runs > 1)
    ends = {kind: _range(dataset, kind) for kind in _STATISTICS}
    panels = []
    for index in range(runs):
        part = dataset.isel(run=index)
        for place, kind in enumerate(_STATISTICS):
            row, column = (place, index) if stacked else (0, place)
            low, high = ends[kind]
            panel = canvas.panel(
                row,
                column,
                title=str(part["run"].item()) if place == 0 else "",
                x_label="layer" if row == rows - 1 else "",
                y_label="" if runs > 1 and column else dataset.attrs[kind],
                y_scale="linear" if low is None else "log",
            )
            _lines(panel, part[kind], low, style)
            draw_bounds(panel, [float(part[f"{kind}_floor"])], [float(part[f"{kind}_ceiling"])])
            if low is not None and high is not None:
                panel.limits("y", low, high)
            panels.append(panel)
    canvas.legend(panels[0])
    return canvas


def _range(dataset: xr.Dataset, kind: str) -> tuple[float, float] | tuple[None, None]:
    """Ends of a logarithmic axis; None where values below 0 ask for a linear one."""
    values = dataset[kind].values
    if np.nanmin(values, initial=0.0) < 0:
        return None, None
    return log_range(values, dataset[f"{kind}_floor"].values, dataset[f"{kind}_ceiling"].values)


def _lines(panel: Panel, values: xr.DataArray, low: float | None, style: Style) -> None:
    layers = values["layer"].values.astype(float)
    for index, stratum in enumerate(values["stratum"].values):
        line = values.sel(stratum=stratum).values
        if np.isfinite(line).any():
            panel.line(
                layers,
                line if low is None else np.maximum(line, low),
                label="all tokens" if stratum == "all" else str(stratum),
                colour=style.palette[index % len(style.palette)],
                dash=_DASHES[index % len(_DASHES)],
            )
