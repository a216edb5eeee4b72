"""How the error of few bits grows with depth, and what it saves to leave the hottest channels in 16 bits.

Left, or above: the relative error of every block's output, and of it what the block's own rounding adds and
what the block makes of the error before it. Right, or below: the divergence by how many of the hottest
channels of every Linear's input stay in 16 bits.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.figures._caption import caption
from osp_diag.figures._placement import InGallery, InReport
from osp_diag.figures._runs import per_run
from osp_diag.figures.backend import Backend, Canvas, Dash, Panel
from osp_diag.figures.styles import Style
from osp_diag.quantizing.measurements import measurement_of, measurement_words
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of
from osp_diag.schema import LAYER_ERRORS, SPARED_CHANNELS

REPORT = InReport("How the error of few bits grows", place=132)
GALLERY = InGallery(
    see="How the error of few bits grows with depth; what it saves to leave a few channels in 16 bits.",
    place=191,
)
_PARTS: dict[str, Dash] = {
    "relative_error": "solid",
    "accumulated_error": "dashed",
    "local_error": "dotted",
}

__all__ = ["GALLERY", "REPORT", "draw", "prepare"]


def prepare(runs: list[Run]) -> xr.Dataset:
    """Errors by layer and the curve of channels that stay.

    Returns
    -------
    ``relative_error``, ``accumulated_error``, ``local_error`` (run, layer) and ``divergence`` (run, channels)
    in nats; NaN where a run has none.
    """
    errors = [measurement_of(run, LAYER_ERRORS) for run in runs]
    curves = [measurement_of(run, SPARED_CHANNELS) for run in runs]
    steps = [step_of(run) for run in runs]
    parts = [
        xr.merge([table[list(_PARTS)], curve[["divergence"]]], combine_attrs="drop")
        for table, curve in zip(errors, curves, strict=True)
    ]
    dataset = per_run(parts, labels_of(runs, steps))
    title = "Relative error of block outputs at few bits, and divergence with channels in 16 bits"
    remarks = dict.fromkeys(
        [
            "Error: mean over tokens of the squared error over the squared norm; solid is all of it, dashed "
            "what a block makes of the error before it, dotted what its own rounding adds, the rest their "
            "interaction",
            *(f"Error: {measurement_words(part)}" for part in errors),
            *(f"KL(full \u2016 rounded) by token: {measurement_words(part)}" for part in curves),
        ]
    )
    dataset.attrs = {"title": title, "caption": caption(title, runs, steps, [], list(remarks))}
    return dataset


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Two panels; a colour a run, a dash a part."""
    inches = style.widths[width]
    stacked = inches < 5
    rows, columns = (2, 1) if stacked else (1, 2)
    canvas = backend.canvas(rows, columns, width=inches, height=2.35 * rows, style=style)
    error = canvas.panel(0, 0, x_label="layer", y_label="relative error", y_scale="log")
    curve = canvas.panel(
        *((1, 0) if stacked else (0, 1)),
        x_label="hottest channels of every input in 16 bits",
        y_label="KL (nat)",
        y_scale="log",
    )
    colours = style.colours_of_runs(dataset.sizes["run"])
    counts = dataset["channels"].values
    places = np.arange(len(counts), dtype=float)
    layers = dataset["layer"].values.astype(float)
    for index, colour in enumerate(colours):
        of_run = dataset.isel(run=index)
        run = str(of_run["run"].item())
        _errors(error, of_run, layers, run, colour)
        measured = np.isfinite(of_run["divergence"].values)
        values = _positive(of_run["divergence"].values[measured])
        curve.line(places[measured], values, label="", colour=colour)
        curve.scatter(places[measured], values, label="", colour=colour)
    curve.ticks("x", places.tolist(), [str(int(count)) for count in counts])
    canvas.legend(error)
    return canvas


def _errors(panel: Panel, of_run: xr.Dataset, layers: np.ndarray, run: str, colour: str) -> None:
    for name, dash in _PARTS.items():
        label = run if name == "relative_error" else ""
        panel.line(layers, _positive(of_run[name].values), label=label, colour=colour, dash=dash)


def _positive(values: np.ndarray) -> np.ndarray:
    """Nothing where a logarithm has nothing to show: the first block accumulates no error."""
    return np.where(values > 0, values, np.nan)
