"""Surfaces over two kinds of channels or tokens, in a grid: what activation and weight surfaces share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from osp_diag.errors import UsageError
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._runs import token_label
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import Style
from osp_diag.wording import number

__all__ = [
    "Z_SCALES",
    "Axes",
    "check_z_scale",
    "draw_surfaces",
    "in_block_order",
    "layer_columns",
    "short_name",
    "stacked",
    "with_layers",
]

Z_SCALES = ("own", "shared")
_FEW_TICKS = 12
_NARROW, _SMALLEST, _NARROWEST = 3.0, 2.0, 1.6
"""inches of a panel: below the first and second it says less, and none is below the third"""
_LETTERS = 12
"""of a title to an inch"""
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Axes:
    """Which variables of a prepared dataset are drawn.

    ``values`` is (run, ``row``, ``y``, ``x``). ``first_<x>`` and ``first_<y>`` say where each cell begins,
    ``peak``, ``peak_<x>`` and ``peak_<y>`` where the largest value is, ``layer`` (run) of which layer it is.
    """

    values: str
    quantity: str
    row: str
    x: str
    y: str


def check_z_scale(figure: str, z_scale: str) -> None:
    """Refuse a word that is none."""
    if z_scale not in Z_SCALES:
        raise UsageError(f"{figure}: z_scale is {' or '.join(Z_SCALES)}, not {z_scale!r}")


def stacked(surfaces: Sequence[xr.Dataset], dim: str, names: Sequence[str]) -> xr.Dataset:
    """Surfaces of one run on a new dimension, the smaller ones padded with NaN."""
    return xr.concat(
        surfaces,
        dim=xr.DataArray(list(names), dims=dim, name=dim),
        join="outer",
        data_vars="all",
        coords="minimal",
        compat="override",
    )


def layer_columns(layer: int | Sequence[int] | None) -> list[int | None]:
    """One column for each layer that is asked for; None stands for the figure's own choice."""
    if layer is None or isinstance(layer, int):
        return [layer]
    return list(dict.fromkeys(layer)) or [None]


def with_layers(labels: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Labels of columns that tell several layers of one run apart."""
    if len(set(labels)) == len(labels):
        return list(labels)
    prefixes = [f"{label}, " if len(set(labels)) > 1 else "" for label in labels]
    return [f"{prefix}layer {layer}" for prefix, layer in zip(prefixes, layers, strict=True)]


def in_block_order(names: Iterable[str]) -> list[str]:
    """Projections in the order in which a block uses them, where their names say it; then the others."""
    rank = {name: place for place, name in enumerate(_PROJECTIONS)}
    return sorted(names, key=lambda name: (rank.get(name.rpartition(".")[2], len(rank)), name))


def short_name(name: str) -> str:
    """A site or projection in a heading: ``linear_input:mlp.down_proj`` → ``down_proj input``."""
    kind, _, path = name.rpartition(":")
    end = path.rpartition(".")[2]
    return f"{end} input" if kind else end


def draw_surfaces(dataset: xr.Dataset, axes: Axes, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A grid: a row a site or projection, a column a run or layer.

    Two or three of one run stand in a row where there is room. Columns that would become too narrow change
    places with the rows, or go into further rows. Small panels say less around them.
    """
    names, runs = dataset[axes.row].values, dataset["run"].values
    inches = style.widths[width]
    fitting = max(1, int(inches / _NARROWEST))
    places = _places(len(names), len(runs), fitting)
    rows, columns = (max(place[axis] for place in places.values()) + 1 for axis in (0, 1))
    narrow = inches / columns < _NARROW
    height = min(inches / columns * 0.8, 3.0) * rows
    canvas = backend.canvas(rows, columns, width=inches, height=height, style=style, three_dimensional=True)
    shared = float(dataset["peak"].max()) if dataset.attrs["z_scale"] == "shared" else None
    lowest = {column: max(r for r, c in places.values() if c == column) for _, column in places.values()}
    for (name_index, run_index), (row, column) in places.items():
        part = dataset.isel({axes.row: name_index, "run": run_index})
        run, name = str(runs[run_index]), short_name(str(names[name_index]))
        axis_labels = {axis: axis.replace("_", " ") for axis in (axes.x, axes.y)}
        if narrow:  # "input" and "output" fit under a small panel, and once under a column will do
            axis_labels = {
                axis: axis.partition("_")[0] if row == lowest[column] else "" for axis in axis_labels
            }
        several = len(runs) > 1 and not run.startswith("layer ")
        title, subtitle = _heading(run if several else "", name, part, axes, inches / columns)
        panel = canvas.panel(
            row,
            column,
            title=title,
            subtitle=subtitle,
            x_label=axis_labels[axes.x],
            y_label=axis_labels[axes.y],
            z_label="" if narrow else axes.quantity,
        )
        if np.isfinite(part["peak"]):
            _draw_one(panel, part, axes, shared or float(part["peak"]), style)
    return canvas


def _places(names: int, runs: int, fitting: int) -> dict[tuple[int, int], tuple[int, int]]:
    """(name, run) → (row, column) of the grid, of which no place stays empty."""
    pairs = [(name, run) for name in range(names) for run in range(runs)]
    # Few names of one run stand side by side, and many runs of few names change places with them.
    if (runs == 1 and names <= min(3, fitting - 1)) or (runs > fitting >= names):
        return {(name, run): (run, name) for name, run in pairs}
    # Several rows for each name, of equal length: the most that fit and divide the runs.
    per_row = max(count for count in range(1, min(runs, fitting) + 1) if runs % count == 0)
    rows = runs // per_row
    return {(name, run): (name * rows + run // per_row, run % per_row) for name, run in pairs}


def _heading(run: str, name: str, part: xr.Dataset, axes: Axes, inches: float) -> tuple[str, str]:
    """Title and subtitle that fit over a panel; ``run`` is empty where there is only one."""
    narrow = inches < _NARROW
    if not np.isfinite(part["peak"]):
        facts = "not in this run"
    else:
        layer = f"layer {int(part['layer'])}"
        # Of several runs in the smallest panels, the caption has to say it.
        layer = "" if layer in run or (run and inches < _SMALLEST) else f"{layer}, "
        facts = f"{layer}max {number(float(part['peak']))}"
        if not narrow:
            places = (f"{axis.partition('_')[0]} {int(part[f'peak_{axis}'])}" for axis in (axes.x, axes.y))
            facts = f"{facts} at {', '.join(places)}"
    if not run:
        return name, facts
    letters = int(inches * _LETTERS)
    if narrow:
        return token_label(run, letters), f"{name}, {facts}"
    return f"{token_label(run, letters - len(name) - 2)}: {name}", facts


def _draw_one(panel: Panel, part: xr.Dataset, axes: Axes, top: float, style: Style) -> None:
    values = part[axes.values].dropna(axes.y, how="all").dropna(axes.x, how="all")
    y = part[f"first_{axes.y}"].values[: values.sizes[axes.y]]
    x = part[f"first_{axes.x}"].values[: values.sizes[axes.x]]
    scale = ColourScale(0.0, top if top > 0 else 1.0)
    panel.surface(values.values, x, y, scale=scale, colour_map=style.surface_map, quantity=axes.quantity)
    panel.limits("z", 0.0, scale.high)
    if f"{axes.y}_text" in part:
        texts = [token_label(str(text)) for text in part[f"{axes.y}_text"].values[: len(y)]]
        if len(y) <= _FEW_TICKS and all(texts):
            panel.ticks("y", y.tolist(), texts)
