"""|W| over input × output channel as a surface: Figures 10 and 11 of the OSP paper.

A row a projection, a column a run or a layer, each surface on its own height unless ``z_scale="shared"``.
Neighbouring channels are pooled by their maximum, so that a single large weight keeps its height. Which maps
a run holds by default, and why pooled: docs/decisions.md, Figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.analyses.thinned_run import evenly
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._decimate import bin_starts, max_pool
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import per_run
from osp_diag.figures._surfaces import (
    Axes,
    check_z_scale,
    draw_surfaces,
    in_block_order,
    layer_columns,
    short_name,
    stacked,
    with_layers,
)
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("fig10", "fig11")
REPORT = InReport("The weights that write the outliers", place=120)
GALLERY = InGallery(SMOLLM2, "Single weights of the matrices that write into the residual stream.", place=70)
AXES = Axes(values="magnitude", quantity="|W|", row="projection", x="input_channel", y="output_channel")
LAYERS = 4
"""Columns that one run gets by default, as in the paper."""

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    weights: str | Sequence[str] | None = None,
    layer: int | Sequence[int] | None = None,
    z_scale: str = "own",
    cells: int = 72,
) -> xr.Dataset:
    """The magnitudes of some projections' weights, pooled to what a picture can hold.

    Parameters
    ----------
    weights : projections by their path within a block or its end, also by pattern, one row each; by default
        all of which every run holds a map
    layer : one, or several side by side; by default up to four of a single run, and of several runs the
        layer of each whose largest weight is largest
    z_scale : ``own`` height for every surface, as in the paper, or one ``shared`` by all
    cells : the most points along each side

    Returns
    -------
    ``magnitude`` (run, projection, output_channel, input_channel) with the first channel of each pooled cell
    as ``first_output_channel`` and ``first_input_channel``; ``layer`` (run); ``peak``,
    ``peak_output_channel`` and ``peak_input_channel`` (run, projection), where |W| is largest. With several
    layers ``run`` has an entry for each.
    """
    check_z_scale("weight_surface", z_scale)
    if cells < 2:
        raise UsageError("weight_surface: a surface needs at least 2 cells a side")
    projections = _projections(runs, [weights] if isinstance(weights, str) else weights)
    columns = layer_columns(layer)
    if layer is None and len(runs) == 1:
        layers_of_run = _shared_layers(runs[0], projections)
        columns = [layers_of_run[place] for place in evenly(len(layers_of_run), LAYERS)]
    parts = [_of_run(run, projections, column, cells) for run in runs for column in columns]
    steps = [step_of(run) for run in runs]
    labels = [label for label in labels_of(runs, steps) for _ in columns]
    dataset = per_run(parts, with_layers(labels, [int(part["layer"]) for part in parts]))
    title = f"|W| over input and output channel: {', '.join(map(short_name, projections))}"
    layers = ", ".join(dict.fromkeys(str(int(part["layer"])) for part in parts))
    criterion = " (where the largest weight is largest)" if layer is None and len(runs) > 1 else ""
    dataset.attrs = {
        "title": title,
        "caption": caption(
            f"{title}, layer {layers}{criterion}",
            runs,
            steps,
            [],
            [f"Weights, which no token changes; cells show the maximum where channels exceed {cells}"],
        ),
        "z_scale": z_scale,
    }
    return dataset


def _projections(runs: list[Run], patterns: Sequence[str] | None) -> list[str]:
    for run in runs:
        if not run.weight_maps:
            raise StoreError(
                f"weight_surface draws weights, and the run of {model_name(run.attrs)} holds none; probe the "
                "checkpoint with `osp-diag probe CHECKPOINT --weights mlp.down_proj` (of a training, what "
                "`osp-diag export` writes)"
            )
    shared = [name for name in runs[0].weight_maps if all(name in run.weight_maps for run in runs[1:])]
    names = []
    for pattern in ["*"] if patterns is None else patterns:
        matches = [
            name
            for name in shared
            if pattern in (name, name.rpartition(".")[2]) or fnmatchcase(name, pattern)
        ]
        if not matches:
            raise StoreError(
                f"weight_surface: no map of weights that the runs share matches {pattern!r}; there are "
                f"{', '.join(in_block_order(shared)) or 'none'}; probe again with it among --weights"
            )
        names += in_block_order(matches)
    return list(dict.fromkeys(names))


def _shared_layers(run: Run, projections: list[str]) -> list[int]:
    """The layers of which the run holds all of these projections; if there are none, those of any."""
    layer_sets = [set(run.weight_map(name)["layer"].values.tolist()) for name in projections]
    return sorted(set.intersection(*layer_sets) or set.union(*layer_sets))


def _of_run(run: Run, projections: list[str], layer: int | None, cells: int) -> xr.Dataset:
    maps = {name: run.weight_map(name).load() for name in projections}
    layers = sorted({int(value) for weight_map in maps.values() for value in weight_map["layer"].values})
    if layer is None:
        peaks = {index: max(_peak(weight_map, index) for weight_map in maps.values()) for index in layers}
        layer = max(peaks, key=lambda index: peaks[index])
    elif layer not in layers:
        raise UsageError(
            f"weight_surface: the run of {model_name(run.attrs)} holds no weights of layer {layer}; it has "
            f"{', '.join(map(str, layers))}"
        )
    surfaces = [_surface(weight_map, layer, cells) for weight_map in maps.values()]
    return stacked(surfaces, "projection", projections).assign(layer=float(layer))


def _peak(weight_map: xr.Dataset, layer: int) -> float:
    if layer not in weight_map["layer"].values:
        return -np.inf
    return float(np.nanmax(weight_map["column_maximum"].sel(layer=layer).values))


def _surface(weight_map: xr.Dataset, layer: int, cells: int) -> xr.Dataset:
    """One map, pooled further; a single empty cell where the projection has none in this layer."""
    if layer not in weight_map["layer"].values:
        nothing, peak = np.zeros(1), (np.nan, np.nan, np.nan)
        return _labelled(np.full((1, 1), np.nan), nothing, nothing, peak)
    at = weight_map.sel(layer=layer)
    # Blocks of different widths are stored padded.
    at = at.dropna("output_cell", how="all", subset=["weight"]).dropna(
        "input_cell", how="all", subset=["weight"]
    )
    values = at["weight"].values.astype(np.float64)
    rows, columns = at["row_maximum"].values, at["column_maximum"].values
    return _labelled(
        max_pool(max_pool(values, 0, cells), 1, cells),
        at["first_output_channel"].values[bin_starts(values.shape[0], cells)],
        at["first_input_channel"].values[bin_starts(values.shape[1], cells)],
        (float(np.nanmax(rows)), float(np.nanargmax(rows)), float(np.nanargmax(columns))),
    )


def _labelled(
    values: np.ndarray, outputs: np.ndarray, inputs: np.ndarray, peak: tuple[float, float, float]
) -> xr.Dataset:
    return xr.Dataset(
        {
            "magnitude": (("output_channel", "input_channel"), values),
            "first_output_channel": (("output_channel",), outputs.astype(float)),
            "first_input_channel": (("input_channel",), inputs.astype(float)),
            "peak": peak[0],
            "peak_output_channel": peak[1],
            "peak_input_channel": peak[2],
        },
        coords={"output_channel": np.arange(len(outputs)), "input_channel": np.arange(len(inputs))},
    )


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A grid of surfaces: a row a projection, a column a run or layer."""
    return draw_surfaces(dataset, AXES, backend, style=style, width=width)
