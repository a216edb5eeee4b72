"""The page's pictures as plain plotly dictionaries, which cost nothing to make and little to send."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.figures._colours import ColourScale, sample
from osp_diag.figures.live._data import curve, floor_of, of_layers, pooled_steps
from osp_diag.figures.styles import RUN_COLOURS
from osp_diag.figures.styles.paper import STYLE

__all__ = ["Shown", "curves", "heat_maps", "maps_height", "scalar_curves"]

Picture = dict[str, Any]

DASHES = ("solid", "dash", "dot")
_LEAST_PIXELS, _PIXELS_A_LAYER, _GAP = 96, 7, 22
_MOST_MARKS = 60
_MARGINS = {"l": 62, "r": 12, "t": 28, "b": 42}


@dataclass(frozen=True)
class Shown:
    """A run on the page: its place in the list decides its colour and dash."""

    place: int
    label: str

    @property
    def colour(self) -> str:
        return RUN_COLOURS[self.place % len(RUN_COLOURS)]

    @property
    def dash(self) -> str:
        return DASHES[self.place // len(RUN_COLOURS) % len(DASHES)]

    @property
    def name(self) -> str:
        """The label for plotly, which takes text for a kind of HTML."""
        return html.escape(self.label)


def curves(
    runs: Sequence[tuple[Shown, xr.DataArray]], *, layer: str, title: str, share: bool = False
) -> Picture:
    """A line a run, and the floor of each dotted. Shares have an axis from 0 to 1."""
    traces: list[Picture] = []
    floors: set[float] = set()
    lines = []
    for shown, values in runs:
        lines.append((shown, curve(values["step"].values, of_layers(values, layer)), floor_of(values)))
    logarithmic = not share and _logarithmic([(points[1], floor) for _, points, floor in lines])
    for shown, (steps, y), floor in lines:
        if logarithmic and floor:
            y = np.where(y == 0, floor / 3, y)  # a kurtosis of 0 stands at the foot
            floors.add(floor)
        traces.append(_line(shown, steps, y))
    axis: Picture = {"title": {"text": title}}
    axis |= {"range": [0, 1.02]} if share else _log_axis([t["y"] for t in traces]) if logarithmic else {}
    shapes = [_level(floor) for floor in sorted(floors)]
    return {"data": traces, "layout": _layout(axis) | {"shapes": shapes, "showlegend": len(traces) > 1}}


def scalar_curves(
    runs: Sequence[tuple[Shown, np.ndarray, dict[str, np.ndarray]]], *, title: str, from_zero: bool = False
) -> Picture:
    """Scalars of each run by step; the first is a line, others are dashed with dots."""
    traces: list[Picture] = []
    for shown, steps, named in runs:
        for index, (name, values) in enumerate(named.items()):
            if not np.isfinite(values).any():
                continue
            if index:
                known = np.isfinite(values)
                x, y = curve(steps[known], values[known])
                marks = "lines+markers" if len(x) <= _MOST_MARKS else "lines"
                looks = {"mode": marks, "marker": {"size": 4, "color": shown.colour}}
                trace = _line(shown, x, y) | looks | {"showlegend": False}
                trace["line"] = trace["line"] | {"dash": "dot"}
            else:
                trace = _line(shown, *curve(steps, values))
            trace["hovertemplate"] = f"{shown.name}<br>step %{{x:,}}<br>{name} %{{y:.4~g}}<extra></extra>"
            traces.append(trace)
    axis: Picture = {"title": {"text": title}} | ({"rangemode": "tozero"} if from_zero else {})
    several = len({shown.place for shown, *_ in runs}) > 1
    return {"data": traces, "layout": _layout(axis) | {"showlegend": several}}


def heat_maps(runs: Sequence[tuple[Shown, xr.DataArray]], *, title: str, share: bool = False) -> Picture:
    """A map of layers and steps for each run, one under the other, in the same colours."""
    pooled = [(shown, *pooled_steps(values), values) for shown, values in runs]
    floors = [floor_of(values) for *_, values in pooled]
    logarithmic = not share and _logarithmic(
        [(z, floor) for (_, _, z, _), floor in zip(pooled, floors, strict=True)]
    )
    low = min((floor for floor in floors if floor), default=None) if logarithmic else None
    if share:
        scale = ColourScale(0.0, 1.0)
    else:
        kind: Any = "log" if logarithmic else "linear"
        scale = ColourScale.over(*(z for _, _, z, _ in pooled), kind=kind, low=low)
    traces: list[Picture] = []
    layout = _layout({}) | {
        "showlegend": False,
        "height": maps_height([v for _, v in runs]),
        "annotations": [],
    }
    domains = _domains([values for _, values in runs]) if runs else []
    for row, (shown, steps, z, values) in enumerate(pooled):
        suffix = _suffix(row)
        layers = values["layer"].values.tolist()
        binned = " and on" if len(steps) < values.sizes["step"] else ""
        traces.append(
            {
                "type": "heatmap",
                "x": steps.tolist(),
                "y": layers,
                "z": _numbers(scale.place(z), 4),
                "customdata": _numbers(z),
                "xaxis": f"x{suffix}",
                "yaxis": f"y{suffix}",
                "coloraxis": "coloraxis",
                "hoverongaps": False,
                "hovertemplate": f"{shown.name}<br>layer %{{y}}, step %{{x:,}}{binned}<br>"
                f"{html.escape(title)} %{{customdata:.4~g}}<extra></extra>",
            }
        )
        layout |= _axes(row, domains[row], len(layers), last=row == len(pooled) - 1)
        layout["annotations"].append(_heading(shown, suffix))
    layout["coloraxis"] = _colour_axis(scale, title, STYLE.share_map if share else STYLE.magnitude_map)
    return {"data": traces, "layout": layout}


def maps_height(runs: Sequence[xr.DataArray]) -> int:
    """Pixels that the maps of these runs take."""
    return _MARGINS["t"] + _MARGINS["b"] + sum(_row_pixels(runs)) + _GAP * max(0, len(runs) - 1)


def _row_pixels(runs: Sequence[xr.DataArray]) -> list[int]:
    return [max(_LEAST_PIXELS, _PIXELS_A_LAYER * values.sizes["layer"]) for values in runs]


def _logarithmic(values: Sequence[tuple[np.ndarray, float | None]]) -> bool:
    """Whether all are above 0; a statistic with a floor above 0 may touch 0."""
    found = False
    for numbers, floor in values:
        known = numbers[np.isfinite(numbers)]
        if known.size and (known.min() < 0 or (known.min() == 0 and not (floor and floor > 0))):
            return False
        found |= bool(known.size and known.max() > 0)
    return found


def _line(shown: Shown, steps: np.ndarray, y: np.ndarray) -> Picture:
    return {
        "type": "scatter",
        "mode": "lines" if np.isfinite(y).sum() > 1 else "lines+markers",
        "x": steps.tolist(),
        "y": _numbers(y),
        "name": shown.name,
        "legendgroup": str(shown.place),
        "line": {"color": shown.colour, "dash": shown.dash, "width": 1.8},
        "hovertemplate": f"{shown.name}<br>step %{{x:,}}<br>%{{y:.4~g}}<extra></extra>",
    }


def _log_axis(lines: Sequence[list[float | None]]) -> Picture:
    """Ticks written out: plotly's own are bare digits between the powers of ten."""
    known = np.array([y for line in lines for y in line if y is not None and y > 0])
    ticks = ColourScale.over(known, kind="log").ticks()
    if len(ticks) > 9:
        ticks = ticks[:: -(-len(ticks) // 9)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _level(value: float) -> Picture:
    return {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value,
        "line": {"color": "#888888", "width": 1.2, "dash": "dot"},
    }  # fmt: skip


def _layout(y_axis: Picture) -> Picture:
    """Transparent, so that the page's colours show; a reader's zoom survives what is new (``uirevision``)."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": _MARGINS,
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "uirevision": "kept",
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": "step"}, "zeroline": False, "tickformat": ","},
        "yaxis": {"zeroline": False, "exponentformat": "SI"} | y_axis,
    }


def _domains(runs: Sequence[xr.DataArray]) -> list[list[float]]:
    """Where the maps stand, as shares of the height between the margins, the first one on top."""
    pixels = _row_pixels(runs)
    whole = sum(pixels) + _GAP * (len(pixels) - 1)
    bottoms = [whole - sum(pixels[: row + 1]) - _GAP * row for row in range(len(pixels))]
    return [
        [bottom / whole, (bottom + height) / whole] for bottom, height in zip(bottoms, pixels, strict=True)
    ]


def _axes(row: int, domain: list[float], layers: int, *, last: bool) -> Picture:
    """The axes of one map among several, which are zoomed along the steps together."""
    suffix = _suffix(row)
    x: Picture = {
        "anchor": f"y{suffix}",
        "zeroline": False,
        "showgrid": False,
        "tickformat": ",",
        "showticklabels": last,
        "title": {"text": "step" if last else ""},
    }
    y: Picture = {
        "anchor": f"x{suffix}",
        "domain": domain,
        "zeroline": False,
        "showgrid": False,
        "title": {"text": "layer"},
        "dtick": max(1, -(-layers // 8)),
    }
    return {f"xaxis{suffix}": x | ({"matches": "x"} if row else {}), f"yaxis{suffix}": y}


def _suffix(row: int) -> str:
    return "" if row == 0 else str(row + 1)


def _heading(shown: Shown, suffix: str) -> Picture:
    return {
        "text": shown.name,
        "xref": "paper",
        "yref": f"y{suffix} domain",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
    }


def _colour_axis(scale: ColourScale, title: str, colour_map: str) -> Picture:
    ticks = [tick for tick in scale.ticks() if scale.low <= tick <= scale.high]
    low, high = (float(scale.place(np.asarray(end))) for end in (scale.low, scale.high))
    places = np.linspace(0, 1, 33)
    return {
        "cmin": low,
        "cmax": high,
        "colorscale": [[float(p), c] for p, c in zip(places, sample(colour_map, 33), strict=True)],
        "colorbar": {
            "title": {"text": html.escape(title), "side": "right"},
            "tickvals": [float(scale.place(np.asarray(tick))) for tick in ticks],
            "ticktext": [f"{tick:g}" for tick in ticks],
            "thickness": 12,
            "outlinewidth": 0,
        },
    }


def _numbers(values: np.ndarray, digits: int = 5) -> list[Any]:
    """Rounded, with null for what JSON has no number for."""
    with np.errstate(divide="ignore", invalid="ignore"):
        size = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
        rounded = np.where(values == 0, 0.0, np.round(values * size) / size)
    found = rounded.astype(object)
    found[~np.isfinite(rounded)] = None
    return found.tolist()
