"""One panel in plotly: a pair of axes or a scene, and the primitives on it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from osp_diag.figures._colours import ColourScale, colour_table, hexadecimal
from osp_diag.figures._decimate import counts_few, spread
from osp_diag.figures.styles import Style

__all__ = ["LEGEND", "MARKS", "Panel", "colour_scale", "plain"]

LEGEND, MARKS = 26, 40
"""pixels that a legend and a row of marks take above a panel"""
_DASHES = {"solid": "solid", "dashed": "dash", "dotted": "dot", "dashdot": "dashdot"}


def plain(text: str) -> str:
    """Text to be shown as it is: plotly reads <s> as a tag otherwise."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def _hover_text(text: str) -> str:
    """As :func:`plain`, in a template in which plotly would put numbers for ``%{x}``."""
    return plain(text).replace("%{", "%\u200b{")


def _without_tags(text: str) -> str:
    return text.replace("<", "\u2039").replace(">", "\u203a")


def colour_scale(name: str) -> list[list[Any]]:
    table = colour_table(name)
    places = np.linspace(0, len(table) - 1, 64).round().astype(int)
    return [[float(i / 63), hexadecimal(table[place])] for i, place in enumerate(places)]


def _as_list(values: Float[np.ndarray, "..."]) -> list[Any]:
    """NaN as None: gaps in lines and holes in maps."""
    as_list: list[Any] = np.where(np.isfinite(values), values.astype(object), np.array(None)).tolist()
    return as_list


class Panel:
    """A pair of axes, or a scene if it is three-dimensional."""

    def __init__(
        self, figure: go.Figure, index: int, style: Style, three_dimensional: bool, title: str
    ) -> None:
        self.figure = figure
        self.style = style
        self.three_dimensional = three_dimensional
        self.title = title
        self.subtitle = ""
        self.suffix = "" if index == 0 else str(index + 1)
        self.traces: list[Any] = []
        self._hovers: list[tuple[Any, str, tuple[Sequence[str] | None, Sequence[str] | None]]] = []
        """trace, what its hover says of the value, texts of its columns and rows"""
        self.tick_texts: list[str] = []
        """of the x axis, where they are given"""
        self.tick_width = 0.0
        """pixels of the longest tick text of the y axis, where they are given"""
        self.mark_places: list[tuple[float, str]] = []
        self.range: tuple[float, float] = (0.0, 1.0)
        self.has_legend = False
        self.log_x = False
        self.log_y = False

    def layout(self, part: str, **settings: Any) -> None:
        self.figure.update_layout({f"{part}{self.suffix}": settings})

    def axis(self, axis: str, **settings: Any) -> None:
        if self.three_dimensional:
            self.layout("scene", **{f"{axis}axis": settings})
        else:
            self.layout(f"{axis}axis", **settings)

    def _add(self, trace: Any) -> None:
        if self.three_dimensional:
            trace.scene = f"scene{self.suffix}"
        else:
            trace.xaxis, trace.yaxis = f"x{self.suffix}", f"y{self.suffix}"
        self.figure.add_trace(trace)
        self.traces.append(self.figure.data[-1])

    def line(
        self,
        x: Float[np.ndarray, " point"],
        y: Float[np.ndarray, " point"],
        *,
        label: str,
        colour: str,
        dash: str = "solid",
        lower: Float[np.ndarray, " point"] | None = None,
        upper: Float[np.ndarray, " point"] | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        positive = np.where(y > 0, y, np.nan) if self.log_y else y
        mode = "markers" if np.isfinite(positive).sum() == 1 else "lines"
        self._add(
            go.Scatter(
                x=_as_list(x),
                y=_as_list(positive),
                name=plain(label),
                mode=mode,
                legend=f"legend{self.suffix}",
                showlegend=bool(label),
                line={"color": colour, "dash": _DASHES[dash], "width": 2.2},
            )
        )
        self._hovers.append((self.traces[-1], f"<extra>{_hover_text(label)}</extra>", (texts, None)))
        if lower is not None and upper is not None:
            red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
            self._add(
                go.Scatter(
                    # There along the upper edge and back along the lower one.
                    x=_as_list(np.concatenate([x, x[::-1]])),
                    y=_as_list(np.concatenate([upper, lower[::-1]])),
                    mode="lines",  # or else a band of few points has markers at its corners
                    fill="toself",
                    fillcolor=f"rgba({red},{green},{blue},0.18)",
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                )
            )

    def level(self, value: float, text: str) -> None:
        reference = {"xref": f"x{self.suffix} domain", "yref": f"y{self.suffix}"}
        self.figure.add_shape(
            type="line",
            x0=0,
            x1=1,
            y0=value,
            y1=value,
            layer="below",
            **reference,
            line={"color": self.style.grey, "width": 1.2, "dash": "dot"},
        )
        self.figure.add_annotation(
            x=1,
            # On a logarithmic axis plotly places shapes by their value, annotations by its logarithm.
            y=np.log10(value) if self.log_y else value,
            text=plain(text),
            showarrow=False,
            xanchor="right",
            yanchor="bottom",
            font={"size": 11, "color": self.style.grey},
            **reference,
        )

    def scatter(
        self,
        x: Float[np.ndarray, " point"],
        y: Float[np.ndarray, " point"],
        *,
        label: str,
        colour: str,
        texts: Sequence[str] | None = None,
    ) -> None:
        self._add(
            go.Scatter(
                x=_as_list(x),
                y=_as_list(y),
                name=plain(label),
                mode="markers",
                legend=f"legend{self.suffix}",
                showlegend=bool(label),
                marker={"color": colour, "size": 6},
            )
        )
        self._hovers.append((self.traces[-1], f"<extra>{_hover_text(label)}</extra>", (texts, None)))

    def heat_map(
        self,
        values: Float[np.ndarray, "row column"],
        x: Float[np.ndarray, " column"],
        y: Float[np.ndarray, " row"],
        *,
        scale: ColourScale,
        colour_map: str,
        quantity: str,
        x_texts: Sequence[str] | None = None,
        y_texts: Sequence[str] | None = None,
    ) -> None:
        self._add(
            go.Heatmap(
                z=_as_list(np.where(np.isfinite(values), scale.place(values), np.nan)),
                x=x.tolist(),
                y=y.tolist(),
                customdata=_as_list(values),
                zmin=float(scale.place(np.asarray(scale.low))),
                zmax=float(scale.place(np.asarray(scale.high))),
                colorscale=colour_scale(colour_map),
                showscale=False,
            )
        )
        value_template = f"{plain(quantity)} %{{customdata:,.4g}}<extra></extra>"
        self._hovers.append((self.traces[-1], value_template, (x_texts, y_texts)))
        half = [(axis[1] - axis[0]) / 2 if len(axis) > 1 else 0.5 for axis in (x, y)]
        self.range = (float(x[0] - half[0]), float(x[-1] + half[0]))
        self.axis("x", range=list(self.range), showgrid=False, mirror=True)
        self.axis("y", range=[float(y[0] - half[1]), float(y[-1] + half[1])], showgrid=False, mirror=True)

    def write_hovers(self, x_name: str, y_name: str) -> None:
        """Say at the pointer what is there, by the names of the axes; those of inner panels are elsewhere."""
        x_name, y_name = (name.partition(",")[0] for name in (x_name, y_name))
        for trace, value_template, (columns, rows) in self._hovers:
            at_x, at_y = f"{x_name} %{{x}}", f"{y_name} %{{y}}"
            if trace.type != "heatmap":
                number = f"{x_name} %{{x:,.6~g}}"
                # Where the axis names its places, the value is along x.
                values = ["%{y}", number] if self.tick_width else [f"{y_name} %{{y:,.4g}}"]
                first = "%{text}" if columns is not None else "" if self.tick_width else number
                trace.text = columns if columns is None else list(map(plain, columns))
                trace.hovertemplate = "<br>".join(filter(None, [first, *values])) + value_template
                continue
            if columns is not None and rows is not None:
                at_x, at_y = "", "%{text}"
                trace.text = [
                    [f"{y_name} {plain(row)}<br>{x_name} {plain(column)}" for column in columns]
                    for row in rows
                ]
            elif columns is not None:
                at_x = f"{x_name} %{{text}}"
                trace.text = [list(map(plain, columns))] * len(trace.y)
            elif rows is not None:
                at_y = f"{y_name} %{{text}}"
                trace.text = [[plain(row)] * len(trace.x) for row in rows]
            trace.hovertemplate = "<br>".join(filter(None, [at_y, at_x, value_template]))

    def surface(
        self,
        values: Float[np.ndarray, "row column"],
        x: Float[np.ndarray, " column"],
        y: Float[np.ndarray, " row"],
        *,
        scale: ColourScale,
        colour_map: str,
        quantity: str,
    ) -> None:
        scene = self.figure.layout[f"scene{self.suffix}"]
        self._add(
            go.Surface(
                z=_as_list(values),
                x=x.tolist(),
                y=y.tolist(),
                surfacecolor=scale.place(values).tolist(),
                cmin=float(scale.place(np.asarray(scale.low))),
                cmax=float(scale.place(np.asarray(scale.high))),
                colorscale=colour_scale(colour_map),
                showscale=False,
                lighting={"ambient": 0.9, "diffuse": 0.25, "specular": 0.0},
                hovertemplate=(
                    f"{scene.xaxis.title.text} %{{x}}<br>{scene.yaxis.title.text} %{{y}}<br>"
                    f"{plain(quantity)} %{{z:,.4g}}<extra></extra>"
                ),
            )
        )

    def ticks(self, axis: Literal["x", "y", "z"], places: Sequence[float], texts: Sequence[str]) -> None:
        # A scene draws its text in WebGL, which drops tags and does not know entities.
        literal = _without_tags if self.three_dimensional else plain
        if axis == "x":
            self.tick_texts = list(texts)
        if axis == "y":
            self.tick_width = 7.5 * max(map(len, texts), default=0)
        self.axis(
            axis, tickvals=[float(place) for place in places], ticktext=[literal(text) for text in texts]
        )

    def marks(self, x: Sequence[float], texts: Sequence[str]) -> None:
        self.mark_places = list(zip(x, texts, strict=True))

    def annotate(self, x: float, y: float, text: str, *, centred: bool = False) -> None:
        self.figure.add_annotation(
            x=np.log10(x) if self.log_x else x,
            y=np.log10(y) if self.log_y else y,
            xref=f"x{self.suffix}",
            yref=f"y{self.suffix}",
            text=plain(text),
            showarrow=False,
            xanchor="center" if centred else "left",
            yanchor="middle" if centred else "bottom",
            font={"size": 12} if centred else {"size": 11, "color": self.style.grey},
        )

    def tick_depth(self, width: float) -> float:
        """Pixels under the panel that tick texts take beyond one line: they stand where they would touch."""
        places = [np.array(trace.x, dtype=float) for trace in self.traces if trace.type == "scatter"]
        if not self.tick_texts and not self.log_x and places and all(map(counts_few, places)):
            self.axis("x", dtick=1)
        # A letter takes 7.5 pixels; texts that would touch stand upright.
        longest = max(map(len, self.tick_texts), default=0)
        if self.three_dimensional or (longest + 1) * len(self.tick_texts) * 7.5 <= width:
            return 0.0
        self.axis("x", tickangle=-90)
        return 7.5 * longest - 12

    def limits(self, axis: Literal["x", "y", "z"], low: float, high: float) -> None:
        logarithmic = (axis == "y" and self.log_y) or (axis == "x" and self.log_x)
        if axis == "x":
            self.range = (low, high)
        self.axis(axis, range=[float(np.log10(low)), float(np.log10(high))] if logarithmic else [low, high])

    def legend(self) -> None:
        self.has_legend = True

    def place(self, left: float, right: float, bottom: float, top: float, width: float) -> None:
        """Put the panel at its part of the figure; ``width`` is the panel's own, in pixels."""
        if self.three_dimensional:
            self.layout("scene", domain={"x": [left, right], "y": [bottom, top]})
        else:
            self.axis("x", domain=[left, right], anchor=f"y{self.suffix}")
            self.axis("y", domain=[bottom, top], anchor=f"x{self.suffix}")
        rise = 4
        if self.has_legend:
            self.layout(
                "legend",
                x=left,
                y=top,
                xanchor="left",
                yanchor="bottom",
                orientation="h",
                font={"size": 12},
                bgcolor="rgba(0,0,0,0)",
            )
            rise += LEGEND
        if self.mark_places:
            self._draw_marks(width)
            rise += MARKS
        text = f"<b>{plain(self.title)}</b>" + (f"<br>{plain(self.subtitle)}" if self.subtitle else "")
        self.figure.add_annotation(
            x=left,
            y=top,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            yshift=rise,
            text=text,
            font={"size": 13},
            align="left",
        )

    def _draw_marks(self, width: float) -> None:
        # ``spread`` works in the units of the axis; arrows lead from the text to the place in pixels.
        low, high = self.range
        longest = max(len(text) for _, text in self.mark_places)
        places = [place for place, _ in self.mark_places]
        for (place, text), where in zip(
            self.mark_places,
            spread(places, (longest + 1.2) * 7 / width * (high - low), low, high),
            strict=True,
        ):
            self.figure.add_annotation(
                x=place,
                y=1,
                xref=f"x{self.suffix}",
                yref=f"y{self.suffix} domain",
                text=plain(text),
                showarrow=True,
                arrowhead=0,
                arrowwidth=1,
                arrowcolor=self.style.grey,
                standoff=0,
                yanchor="bottom",
                ax=(where - place) / (high - low) * width,
                ay=-14,
                font={"size": 11},
            )
