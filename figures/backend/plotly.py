"""The primitives in plotly: one interactive HTML file that needs no network.

Panels are laid out by hand, in pixels, because only then do legends, marks and colour bars of
several panels keep clear of each other.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from osp_diag.figures._colours import ColourScale
from osp_diag.figures.backend._plotly_panel import LEGEND, MARKS, Panel, colour_scale, plain
from osp_diag.figures.styles import Style

__all__ = ["Canvas", "Panel", "canvas"]

_CONFIG = {
    "displaylogo": False,
    "responsive": False,
    "showSendToCloud": False,  # a button that would upload the figure to plotly's maker
    "toImageButtonOptions": {"format": "svg"},
}

# pixels kept free around a panel
_LEFT, _RIGHT, _BELOW = 74, 22, 58
_TICKS = 38  # of _LEFT
_TOOLS = 26  # of plotly's own buttons, above everything
_TITLE, _SUBTITLE, _LINE, _BAR = 30, 18, 16, 96
_LEGEND_KEY, _LETTER, _LEGEND_LINE = (
    48,
    7,
    19,
)  # of an entry: its line with gaps, a letter of it; a further row


class Canvas:
    """A plotly Figure and the grid of its panels."""

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        width: float,
        height: float,
        style: Style,
        three_dimensional: bool,
        share_y: bool,
    ) -> None:
        self.rows, self.columns = rows, columns
        self.style = style
        self.three_dimensional = three_dimensional
        self.share_y = share_y
        self.width, self.height = width * style.pixels_per_inch, height * style.pixels_per_inch
        self.figure = go.Figure(layout={"showlegend": True, "template": {"layout": dict(style.plotly)}})
        self.panels: dict[tuple[int, int], Panel] = {}
        self.bars: list[tuple[str, list[Panel]]] = []
        self.text = ""
        self.common_legend: tuple[Panel, ...] = ()
        self.label_lines = [0] * columns
        self._placed = False

    def panel(
        self,
        row: int,
        column: int,
        *,
        title: str = "",
        subtitle: str = "",
        x_label: str = "",
        y_label: str = "",
        z_label: str = "",
        x_scale: str = "linear",
        y_scale: str = "linear",
    ) -> Panel:
        index = row * self.columns + column
        panel = self.panels[row, column] = Panel(
            self.figure, index, self.style, self.three_dimensional, title
        )
        panel.subtitle = subtitle
        panel.log_x, panel.log_y = x_scale == "log", y_scale == "log"
        logarithmic = {
            "type": "log",
            "dtick": 1,
            "tickformat": ",~g",
            "minor": {"ticks": "outside", "ticklen": 3},
        }
        if self.three_dimensional:
            for axis, label in (("x", x_label), ("y", y_label), ("z", z_label)):
                panel.axis(
                    axis,
                    title={"text": plain(label), "font": {"size": 12}},
                    tickfont={"size": 10},
                    nticks=6,
                    backgroundcolor="white",
                    gridcolor="#dddddd",
                )
            panel.layout(
                "scene",
                aspectmode="manual",
                aspectratio={"x": 1.35, "y": 1.1, "z": 0.75},
                camera={"eye": {"x": 1.2, "y": -1.68, "z": 0.94}, "center": {"x": 0, "y": 0, "z": -0.14}},
            )
            return panel
        panel.axis(
            "x", title={"text": plain(x_label), "standoff": 6}, **(logarithmic if x_scale == "log" else {})
        )
        lines = y_label.count("\n")  # plotly measures the distance to the first line
        self.label_lines[column] = max(self.label_lines[column], lines)
        heading: dict[str, Any] = {"text": plain(y_label), "standoff": 6 + _LINE * lines}
        panel.axis("y", title=heading, **(logarithmic if y_scale == "log" else {}))
        if self.share_y and column:
            panel.axis("y", matches=f"y{self.panels[row, 0].suffix}", showticklabels=False)
        return panel

    def legend(self, *panels: Panel) -> None:
        self.common_legend = panels

    def colour_bar(self, panels: Sequence[Panel], *, scale: ColourScale, colour_map: str, label: str) -> None:
        name = "coloraxis" if not self.bars else f"coloraxis{len(self.bars) + 1}"
        ticks = scale.ticks()
        low, high = (float(scale.place(np.asarray(end))) for end in (scale.low, scale.high))
        bar = {
            "title": {"text": plain(label), "side": "right", "font": {"size": 13}},
            "thickness": 13,
            "outlinewidth": 0.5,
            "tickvals": scale.place(np.asarray(ticks)).tolist(),
            "ticktext": [f"{tick:,g}" for tick in ticks],
        }
        self.figure.update_layout(
            {name: {"colorscale": colour_scale(colour_map), "cmin": low, "cmax": high, "colorbar": bar}}
        )
        for trace in (trace for panel in panels for trace in panel.traces):
            if trace.type in ("heatmap", "surface"):
                trace.coloraxis = name
        self.bars.append((name, list(panels)))

    def caption(self, text: str) -> None:
        self.text = text

    def _columns(self) -> list[tuple[float, float]]:
        """Left and right pixel of each column, colour bars kept free."""
        # Beside a column stand its tick texts and the lines of its label.
        beside = [_LEFT] * self.columns
        for (_, column), panel in self.panels.items():
            beside[column] = max(beside[column], round(_LEFT + panel.tick_width - _TICKS))
        beside = [margin + _LINE * lines for margin, lines in zip(beside, self.label_lines, strict=True)]
        left = 10 if self.three_dimensional else beside[0]
        # Behind a column stand the labels of the next one, unless the row shares its axis, and a colour bar.
        shared = self.three_dimensional or self.share_y
        behind = [_RIGHT if shared else between for between in beside[1:]] + [_RIGHT]
        for _, panels in self.bars:
            column = max(c for (_, c), panel in self.panels.items() if panel in panels)
            behind[column] = max(
                behind[column], _BAR + (beside[column + 1] if column < self.columns - 1 else 0)
            )
        column_width = (self.width - left - sum(behind)) / self.columns
        starts = [left + sum(behind[:column]) + column_width * column for column in range(self.columns)]
        return [(start, start + column_width) for start in starts]

    def _row_heads(self) -> list[float]:
        """Pixels above the panels of each row, for titles, legends and marks."""
        heads: list[float] = []
        for row in range(self.rows):
            panels = [panel for (r, _), panel in self.panels.items() if r == row]
            heads.append(
                _TITLE
                + (_SUBTITLE if any(panel.subtitle for panel in panels) else 0)
                + (LEGEND if any(panel.has_legend for panel in panels) else 0)
                + (MARKS if any(panel.mark_places for panel in panels) else 0)
            )
        heads[0] += self._common_legend_height()
        return heads

    def _common_legend_height(self) -> float:
        """Pixels; plotly sets entries that do not fit one row in columns as wide as the widest of them."""
        names = [trace.name for panel in self.common_legend for trace in panel.traces if trace.showlegend]
        if not names:
            return 0
        widths = [_LEGEND_KEY + _LETTER * len(name) for name in names]
        per_row = len(names) if sum(widths) <= self.width else max(1, int(self.width // max(widths)))
        return LEGEND + _LEGEND_LINE * (-(-len(names) // per_row) - 1)

    def _place(self) -> None:
        """Lay everything out; once, when all is known."""
        if self._placed:
            return
        self._placed = True
        # A letter of the small print takes 6.3 pixels, a line 15.
        lines = textwrap.wrap(self.text, int((self.width - 20) / 6.3))
        small_print = len(lines) * 15 + 16 if lines else 0
        columns = self._columns()
        panel_width = columns[0][1] - columns[0][0]
        deepest = max((panel.tick_depth(panel_width) for panel in self.panels.values()), default=0.0)
        below = 8 if self.three_dimensional else _BELOW + max(deepest, 0.0)
        heads = self._row_heads()
        row_height = (self.height - sum(heads) - below * self.rows) / self.rows
        # plotly's places are shares of the figure, from the bottom up.
        for (row, column), panel in self.panels.items():
            left, right = columns[column]
            top = sum(heads[: row + 1]) + row * (row_height + below)
            panel.place(
                left / self.width,
                right / self.width,
                1 - (top + row_height) / self.height,
                1 - top / self.height,
                right - left,
            )
            if not self.three_dimensional:
                panel.write_hovers(self._axis_name(row, column, "x"), self._axis_name(row, column, "y"))
        self._place_bars()
        with_legend = [
            panel for panel in self.panels.values() if panel.has_legend or panel in self.common_legend
        ]
        for panel in self.panels.values():
            for trace in panel.traces if panel not in with_legend else ():
                trace.showlegend = False
        if self.common_legend:
            first = self.common_legend[0]
            for trace in (trace for panel in self.common_legend[1:] for trace in panel.traces):
                if trace.showlegend:
                    trace.legend = f"legend{first.suffix}"
            first.layout(
                "legend",
                x=10 / self.width,
                y=1,
                xanchor="left",
                yanchor="top",
                orientation="h",
                font={"size": 12},
            )
        if lines:
            self.figure.add_annotation(
                x=10 / self.width,
                y=0,
                xref="paper",
                yref="paper",
                xanchor="left",
                yanchor="top",
                yshift=-4,
                showarrow=False,
                align="left",
                text="<br>".join(map(plain, lines)),
                font={"size": 11, "color": self.style.grey},
            )
        self.figure.update_layout(
            width=self.width,
            height=self.height + small_print + _TOOLS,
            margin={"l": 0, "r": 0, "t": _TOOLS, "b": small_print},
        )

    def _axis_name(self, row: int, column: int, axis: str) -> str:
        """The label of a panel's axis in one line; that of its column or row where it has none of its own."""
        along = 1 if axis == "x" else 0
        aligned = [panel for place, panel in self.panels.items() if place[along] == (row, column)[along]]
        for panel in (self.panels[row, column], *reversed(aligned)):
            text = self.figure.layout[f"{axis}axis{panel.suffix}"].title.text
            if text:
                return str(text).replace("<br>", " ")
        return axis

    def _place_bars(self) -> None:
        for name, panels in self.bars:
            domains = [self._domain(panel) for panel in panels]
            bottom, top = min(d[1][0] for d in domains), max(d[1][1] for d in domains)
            right = max(d[0][1] for d in domains)
            self.figure.layout[name].colorbar.update(
                x=right + 6 / self.width,
                xanchor="left",
                xpad=4,
                y=(bottom + top) / 2,
                len=top - bottom,
                ypad=0,
            )

    def _domain(self, panel: Panel) -> tuple[tuple[float, float], tuple[float, float]]:
        layout = self.figure.layout
        if self.three_dimensional:
            domain = layout[f"scene{panel.suffix}"].domain
            return domain.x, domain.y
        return layout[f"xaxis{panel.suffix}"].domain, layout[f"yaxis{panel.suffix}"].domain

    def finish(self, dataset: xr.Dataset) -> go.Figure:
        self._place()
        return self.figure

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._place()
        page = self.figure.to_html(include_plotlyjs=True, include_mathjax=False, config=_CONFIG)
        head = (
            f"<head>\n<title>{html.escape(metadata['title'])}</title>\n"
            f'<meta name="description" content="{html.escape(metadata["caption"])}"/>'
        )
        path.write_text(page.replace("<head>", head, 1), encoding="utf-8")


def canvas(
    rows: int,
    columns: int,
    *,
    width: float,
    height: float,
    style: Style,
    three_dimensional: bool = False,
    share_y: bool = False,
) -> Canvas:
    """A grid of plotly axes or scenes."""
    return Canvas(
        rows,
        columns,
        width=width,
        height=height,
        style=style,
        three_dimensional=three_dimensional,
        share_y=share_y,
    )
