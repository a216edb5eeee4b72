"""Where few bits hurt: what each part of the model costs if it alone is rounded, by layer.

A row a part (weights by what they are, inputs by where they are, keys, values), a column a layer; the last
column is the part rounded in all layers at once, which is not the sum of the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._placement import InGallery, InReport
from osp_diag.figures._runs import per_run
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.quantizing.measurements import measurement_of, measurement_words
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of
from osp_diag.schema import SENSITIVITY

REPORT = InReport("Where few bits hurt", place=131)
GALLERY = InGallery(see="What each part costs at few bits if it alone is rounded.", place=190)
_DARKEST = 1e-4
"""Of the largest value: what costs less is as dark as can be."""
_GAP = 1.0
"""Columns between the last layer and all layers."""

__all__ = ["GALLERY", "REPORT", "draw", "prepare"]


def prepare(runs: list[Run]) -> xr.Dataset:
    """Divergence of parts that are rounded alone.

    Returns
    -------
    ``divergence`` (run, part, layer) and ``divergence_all_layers`` (run, part) in nats, NaN where there is
    no such part.
    """
    measured = [measurement_of(run, SENSITIVITY) for run in runs]
    order = list(dict.fromkeys(str(part) for table in measured for part in table["part"].values))
    parts = [
        table[["divergence", "divergence_all_layers"]].assign_coords(part=table["part"].values.astype(object))
        for table in measured
    ]
    steps = [step_of(run) for run in runs]
    dataset = per_run([part.reindex(part=order) for part in parts], labels_of(runs, steps))
    title = "Divergence at few bits of one part alone, by part and layer"
    remarks = dict.fromkeys(
        f"KL(full \u2016 rounded) by token: {measurement_words(part)}" for part in measured
    )
    dataset.attrs = {"title": title, "caption": caption(title, runs, steps, [], list(remarks))}
    return dataset


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A map a run, all on the same colours."""
    runs = dataset.sizes["run"]
    height = (0.16 * dataset.sizes["part"] + 0.9) * runs
    canvas = backend.canvas(runs, 1, width=style.widths[width], height=height, style=style)
    everything = [dataset[name].values for name in ("divergence", "divergence_all_layers")]
    top = max((float(np.nanmax(part)) for part in everything if np.isfinite(part).any()), default=1.0)
    scale = ColourScale.over(*everything, kind="log", low=_DARKEST * top if top > 0 else None)
    colours: dict[str, Any] = {"scale": scale, "colour_map": style.magnitude_map}
    panels = []
    for row in range(runs):
        of_run = dataset.isel(run=row)
        of_run = of_run.sel(part=np.isfinite(of_run["divergence_all_layers"].values))
        layers = of_run["layer"].values[np.isfinite(of_run["divergence"].values).any(axis=0)].astype(float)
        names = [str(part) for part in of_run["part"].values][::-1]
        panel = canvas.panel(
            row, 0, title=str(of_run["run"].item()), x_label="layer" if row == runs - 1 else ""
        )
        pointed = [*(f"{layer:.0f}" for layer in layers), "", "all"]
        panel.heat_map(
            *_cells(of_run, layers), quantity="KL (nat)", x_texts=pointed, y_texts=names, **colours
        )
        panel.ticks("y", list(range(len(names))), names)
        shown = layers[:: max(1, len(layers) // 8)]
        end = (layers[-1] if len(layers) else 0.0) + 1 + _GAP
        panel.ticks("x", [*shown.tolist(), end], [*(f"{layer:.0f}" for layer in shown), "all"])
        panels.append(panel)
    canvas.colour_bar(panels, label="KL (nat)", **colours)
    return canvas


def _cells(of_run: xr.Dataset, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, x and y of the cells: the first part on top, the column of all layers behind a gap."""
    values = of_run["divergence"].sel(layer=layers).transpose("part", "layer").values
    overall = of_run["divergence_all_layers"].values[:, None]
    cells = np.concatenate([values, np.full_like(overall, np.nan), overall], axis=1)[::-1]
    start = layers[-1] if len(layers) else 0.0
    x = np.concatenate([layers, [start + _GAP, start + 1 + _GAP]])
    return cells, x, np.arange(len(cells), dtype=float)
