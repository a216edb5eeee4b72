"""How much energy sits in how few channels: concentration curves by layer, models side by side."""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.profiles import concentration_curve
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import sample
from osp_diag.figures._placement import ADAM_AND_OSP, InGallery, InReport
from osp_diag.figures._runs import identifier, per_run, statistics
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("concentration",)
REPORT = InReport("How few channels hold the energy", place=50)
GALLERY = InGallery(ADAM_AND_OSP, "How much energy sits in how few channels.", place=140)
POINTS = 150
"""Numbers of channels at which a curve is drawn at most; a curve is concave, so none is a spike."""
_COLUMNS = 3
_NAMED = 6

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run], *, site: str = "residual_post", stratum: str = "all", step: int | None = None
) -> xr.Dataset:
    """The share of Σ x² in the k largest channels, by layer.

    Parameters
    ----------
    site : where
    stratum : of which tokens; ``rest`` leaves the spikes of the first token out
    step : of training; the last one by default

    Returns
    -------
    ``energy_share`` (run, layer, point) in the ``count`` (run, point) largest channels of ``width`` (run);
    wider models have more points, the others NaN.
    """
    parts, steps, identifiers = [], [], []
    for run in runs:
        rms = statistics(run, site, ("channel_rms",), "concentration_curves", step)["channel_rms"]
        if stratum not in rms["stratum"].values:
            strata = ", ".join(str(name) for name in rms["stratum"].values)
            raise UsageError(f"concentration_curves: no stratum is named {stratum!r}; there are {strata}")
        identifiers.append(identifier(rms))
        rms = rms.sel(stratum=stratum, drop=True).transpose("layer", "channel")
        parts.append(_curves(rms))
        steps.append(step_of(run, step))
    dataset = per_run(parts, labels_of(runs, steps))
    title = f"Share of the energy of {site} in the largest channels, by layer, {stratum} tokens"
    remark = "Channels are sorted anew in each layer; dashed: all channels equally large"
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, identifiers, [remark]),
        "site": site,
    }
    return dataset


def _curves(rms: xr.DataArray) -> xr.Dataset:
    width = rms.sizes["channel"]
    # Evenly spaced in the logarithm, as the axis is.
    counts = np.unique(np.round(np.geomspace(1, width, POINTS)).astype(int))
    curve = concentration_curve(rms.values.astype(np.float64))
    return xr.Dataset(
        {
            "energy_share": (("layer", "point"), curve[:, counts]),
            "count": (("point",), counts.astype(float)),
            "width": float(width),
        },
        coords={"layer": rms["layer"].values, "point": np.arange(len(counts))},
    )


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A panel a run, a line a layer, from dark (the first) to light (the last)."""
    runs = dataset.sizes["run"]
    inches = style.widths[width]
    columns = min(runs, 1 if inches < 5 else _COLUMNS)
    rows = -(-runs // columns)
    canvas = backend.canvas(rows, columns, width=inches, height=2.5 * rows, style=style, share_y=columns > 1)
    layers = [_layers_of(dataset.isel(run=index)) for index in range(runs)]
    same = len(set(layers)) == 1
    panels = []
    for index in range(runs):
        part = dataset.isel(run=index)
        panel = canvas.panel(
            index // columns,
            index % columns,
            title=str(part["run"].item()),
            x_label="largest channels (share of the width)" if index // columns == rows - 1 else "",
            y_label="" if index % columns else f"share of energy\n{dataset.attrs['site']}",
            x_scale="log",
        )
        present = np.isfinite(part["count"].values)
        x = part["count"].values[present] / float(part["width"])
        last = max(len(layers[index]) - 1, 1)
        colours = sample("batlow", len(layers[index]), 0.02, 0.85)
        labelled = set(np.linspace(0, last, min(last + 1, _NAMED)).round().astype(int).tolist())
        for place, layer in enumerate(layers[index]):
            label = f"layer {layer}" if same else f"depth {place / last:.0%}"
            y = part["energy_share"].sel(layer=layer).values[present]
            panel.line(x, y, label=label if place in labelled else "", colour=colours[place])
        panel.line(x, x, label="equal channels", colour=style.grey, dash="dashed")
        panel.limits("y", 0.0, 1.02)
        panels.append(panel)
    canvas.legend(panels[int(np.argmax([len(layers_of_run) for layers_of_run in layers]))])
    return canvas


def _layers_of(part: xr.Dataset) -> tuple[int, ...]:
    """The layers that this run has; others pad it."""
    present = np.isfinite(part["energy_share"].transpose("layer", "point").values).any(axis=1)
    return tuple(int(layer) for layer in part["layer"].values[present])
