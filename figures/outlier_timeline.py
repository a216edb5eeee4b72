"""When outliers appear, layer by layer: log kurtosis over layer and training step, with the onsets marked.

Why change points, and why with intervals: docs/decisions.md, Analyses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.emergence.history import log_kurtosis, onsets
from osp_diag.analyses.emergence.onset import DEPARTURE, FEWEST_PROBES
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._decimate import bin_starts, max_pool
from osp_diag.figures._placement import ADAM_AND_OSP, InGallery, InReport
from osp_diag.figures._runs import nothing_finite
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("timeline",)
REPORT = InReport("When outliers appeared, layer by layer", place=20, fewest_steps=2, options={"draws": 20})
GALLERY = InGallery(ADAM_AND_OSP, "When the kurtosis of each layer leaves the noise.", place=150)
_TICKS = 6

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    site: str = "residual_post",
    stratum: str = "all",
    departure: float = DEPARTURE,
    draws: int = 100,
    pixels: int = 320,
) -> xr.Dataset:
    """Kurtosis over its noise by layer and probed step, and each layer's onset.

    Parameters
    ----------
    site : where the OSP kurtosis is taken
    stratum : of which tokens: all, first, delimiter or rest
    departure : an onset takes that many times the noise
    draws : of the bootstrap that gives the onset its interval
    pixels : neighbouring steps are pooled by their maximum down to this many columns

    Returns
    -------
    ``value`` (run, layer, column): κ / noise; ``step`` (run, column): the first probed step of a column;
    ``onset``, ``onset_low``, ``onset_high`` (run, layer) in columns, NaN where a layer stays in the
    noise or the run is too short to tell (``marked`` (run) is False then).
    """
    if pixels < 1:
        raise UsageError(f"outlier_timeline: pixels must be at least 1, not {pixels}")
    steps = [step_of(run) for run in runs]
    parts, short, estimators = [], [], []
    labels = labels_of(runs, steps)
    for run, label in zip(runs, labels, strict=True):
        ratio = log_kurtosis(run, sites=[site]).sel(site=site)
        strata = [str(name) for name in ratio["stratum"].values]
        if stratum not in strata:
            raise UsageError(f"outlier_timeline: stratum is one of {', '.join(strata)}, not {stratum!r}")
        if not np.isfinite(ratio.sel(stratum=stratum).values).any():
            subject = f"the OSP kurtosis of {site}, {stratum} tokens,"
            raise StoreError(nothing_finite(run, subject, "outlier_timeline"))
        estimators.append(str(ratio.attrs["estimator"]))
        long_enough = len(run.steps) >= FEWEST_PROBES
        onset = None
        if long_enough:
            onset = onsets(run, sites=[site], strata=[stratum], departure=departure, draws=draws)
        parts.append(_panel(ratio.sel(stratum=stratum), onset, stratum, pixels))
        if not long_enough:
            short.append(label)
    title = f"OSP kurtosis of {site} over its noise by layer and step, {stratum} tokens"
    remarks = []
    if len(short) < len(runs):
        remarks.append(
            f"Dots: onset, the first probed step told from noise of the rise to {departure:g} times it "
            f"(change points by ruptures); bars: 90% of {draws} bootstrap draws and the probe before"
        )
    if short:
        remarks.append(f"No onsets for {', '.join(short)}: fewer than {FEWEST_PROBES} probed steps")
    pooled = any(len(run.steps) > pixels for run in runs)
    columns = f"the maximum over neighbouring probed steps, {pixels} in all" if pooled else "probed steps"
    remarks.append(f"Columns are {columns}, not always equally far apart")
    dataset = xr.concat(
        parts, dim=xr.DataArray(labels, dims="run", name="run"), join="outer", combine_attrs="override"
    )
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, estimators, remarks),
        "quantity": f"{estimators[0]}\n÷ noise",
        "departure": departure,
    }
    return dataset


def _panel(ratio: xr.DataArray, onset: xr.Dataset | None, stratum: str, pixels: int) -> xr.Dataset:
    """One run's map. The formula can give 0, which a logarithmic colour shows as its lowest."""
    values = np.exp(ratio.transpose("layer", "step").values)
    steps = ratio["step"].values
    starts = bin_starts(len(steps), pixels)
    part = xr.Dataset(
        {
            "value": (("layer", "column"), max_pool(values, 1, pixels)),
            "marked": onset is not None,
        },
        coords={
            "layer": ratio["layer"].values,
            "column": np.arange(len(starts)),
            "step": ("column", steps[starts].astype(float)),
        },
    )
    for name in ("onset", "onset_low", "onset_high"):
        at = np.full(len(values), np.nan)
        if onset is not None:
            at = onset[name].isel(site=0).sel(stratum=stratum).values
        # A step's column is the last that begins at or before it.
        column = np.searchsorted(steps[starts], at, side="right") - 1.0
        part[name] = ("layer", np.where(np.isfinite(at), column, np.nan))
    return part.reset_coords("step")


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """One map a run, one under the other, all on the same colours."""
    runs = dataset.sizes["run"]
    inches = style.widths[width]
    panel_height = min(max(1.75, 0.09 * dataset.sizes["layer"] + 1.1), 4.0)
    canvas = backend.canvas(runs, 1, width=inches, height=panel_height * runs, style=style)
    values = dataset["value"].values
    top = float(np.max(values, where=np.isfinite(values), initial=2 * dataset.attrs["departure"]))
    # 1 is noise; what lies below it is noise too, and would only take colours away from the rest
    colours: dict[str, Any] = {"scale": ColourScale(1.0, top, "log"), "colour_map": style.magnitude_map}
    panels = []
    for row in range(runs):
        part = dataset.isel(run=row)
        onset = part["onset"].values
        whole = int(np.isfinite(part["value"].values).any(axis=1).sum())
        subtitle = (
            f"{int(np.isfinite(onset).sum())} of {whole} layers depart" if part["marked"].item() else ""
        )
        panel = canvas.panel(
            row,
            0,
            title=str(part["run"].item()),
            subtitle=subtitle,
            y_label="layer",
            x_label="probed step" if row == runs - 1 else "",
        )
        _draw_map(part, panel, dataset.attrs["quantity"].replace("\n", " "), colours)
        _draw_onsets(part, panel, style)
        panels.append(panel)
    canvas.colour_bar(panels, label=dataset.attrs["quantity"], **colours)
    return canvas


def _draw_map(part: xr.Dataset, panel: Panel, quantity: str, colours: dict[str, Any]) -> None:
    columns = int(np.isfinite(part["step"].values).sum())
    layers = part["layer"].values[np.isfinite(part["value"].values).any(axis=1)]
    values = part["value"].sel(layer=layers).transpose("layer", "column").values[:, :columns]
    panel.heat_map(
        values, np.arange(columns, dtype=float), layers.astype(float), quantity=quantity, **colours
    )
    steps = part["step"].values
    # as many as stand side by side: long numbers would be turned upright
    most = _TICKS if np.nanmax(steps) >= 1000 else 2 * _TICKS
    tick_columns = np.unique(np.linspace(0, columns - 1, min(columns, most)).astype(int))
    panel.ticks(
        "x", [float(place) for place in tick_columns], [f"{steps[place]:,.0f}" for place in tick_columns]
    )


def _draw_onsets(part: xr.Dataset, panel: Panel, style: Style) -> None:
    """A dot a layer, and a bar over its interval, in white: a rise begins in the dark half of the colours."""
    layers = part["layer"].values.astype(float)
    onset = part["onset"].values
    departed = np.isfinite(onset)
    if not departed.any():
        return
    for layer, low, high in zip(
        layers[departed], part["onset_low"].values[departed], part["onset_high"].values[departed], strict=True
    ):
        panel.line(np.array([low, high]), np.array([layer, layer]), label="", colour="#ffffff")
    panel.scatter(onset[departed], layers[departed], label="", colour="#ffffff")
