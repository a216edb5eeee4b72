"""The primitives in matplotlib: PNG, PDF and SVG at the width of a paper's column.

Figures are made without pyplot, so that nothing global is touched and nothing has to be closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, LogLocator, MaxNLocator, NullLocator

from osp_diag.figures._colours import ColourScale
from osp_diag.figures._decimate import counts_few, spread
from osp_diag.figures.backend._matplotlib_colours import colour_map_of, edges_of, norm_of
from osp_diag.figures.backend._matplotlib_text import file_metadata, fitting, plain, wrapped
from osp_diag.figures.styles import Style

__all__ = ["Canvas", "Panel", "canvas"]

P = ParamSpec("P")
R = TypeVar("R")

_DASHES = {"solid": "-", "dashed": (0, (4, 1.6)), "dotted": (0, (1, 1.4)), "dashdot": (0, (5, 1.5, 1, 1.5))}
_INCH = 72.0
_LINE = 11.0
"""points that a line of a legend or a subtitle takes"""
_SMALL = 2.2
"""inches of a panel, below which an axis has room for three or four ticks"""


def _under_style(method: Callable[P, R]) -> Callable[P, R]:
    """The method run with the settings of its object's style, and no trace of them afterwards."""

    @wraps(method)
    def styled(*values: P.args, **options: P.kwargs) -> R:
        settings: Any = values[0].style.matplotlib  # type: ignore[attr-defined]
        with mpl.rc_context(dict(settings)):
            return method(*values, **options)

    return styled


class _PlainMinor(LogFormatter):
    """Labels between powers of ten, where matplotlib finds them needed, without a power of ten in them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,g}" if super().__call__(x, pos) else ""


class Panel:
    """One Axes."""

    def __init__(self, axes: Any, style: Style) -> None:
        self.axes = axes
        self.style = style
        self.title = ""

    def head(self, title: str, subtitle: str) -> None:
        """Title in bold, and under it in plain what is special to the panel."""
        self.title = plain(title)
        if subtitle:
            self.axes.annotate(
                plain(subtitle),
                (0, 1),
                xycoords="axes fraction",
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=7,
                annotation_clip=False,
            )
        self._raise_title(_LINE if subtitle else 0)

    def _raise_title(self, points: float) -> None:
        """Leave room between the panel and its title."""
        self.axes.set_title(self.title, loc="left", pad=4 + points)

    @_under_style
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
        mark = "o" if np.isfinite(y).sum() == 1 else None
        self.axes.plot(x, y, label=plain(label), color=colour, linestyle=_DASHES[dash], marker=mark)
        if self.axes.get_xscale() == "linear" and counts_few(x):
            self.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if lower is not None and upper is not None:
            self.axes.fill_between(x, lower, upper, color=colour, alpha=0.18, linewidth=0)

    @_under_style
    def level(self, value: float, text: str) -> None:
        self.axes.axhline(value, color=self.style.grey, linewidth=0.7, linestyle=(0, (2, 1.5)), zorder=1)
        self.axes.annotate(
            plain(text),
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 1.5),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=6.5,
            color=self.style.grey,
        )

    @_under_style
    def scatter(
        self,
        x: Float[np.ndarray, " point"],
        y: Float[np.ndarray, " point"],
        *,
        label: str,
        colour: str,
        texts: Sequence[str] | None = None,
    ) -> None:
        self.axes.scatter(x, y, label=plain(label), color=colour, s=9, linewidths=0, zorder=3)

    @_under_style
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
        left, right = edges_of(x)[[0, -1]]
        bottom, top = edges_of(y)[[0, -1]]
        shown = np.maximum(values, scale.low) if scale.kind == "log" else values
        self.axes.imshow(
            np.ma.masked_invalid(shown),
            norm=norm_of(scale),
            cmap=colour_map_of(colour_map),
            aspect="auto",
            origin="lower",
            extent=(left, right, bottom, top),
            interpolation="nearest",
        )
        self.axes.grid(False)
        self.axes.spines[["top", "right"]].set_visible(True)
        small = self.axes.figure.get_figwidth() / self.axes.get_gridspec().ncols < _SMALL
        for axis, ticks in ((self.axes.xaxis, 4 if small else 8), (self.axes.yaxis, 8)):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=ticks, min_n_ticks=2))

    @_under_style
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
        corners = [values[:-1, :-1], values[1:, :-1], values[:-1, 1:], values[1:, 1:]]
        colours = colour_map_of(colour_map)(scale.fraction(np.fmax.reduce(corners)))
        across, along = np.meshgrid(x, y)
        self.axes.plot_surface(
            across,
            along,
            values,
            facecolors=colours,
            rcount=values.shape[0],
            ccount=values.shape[1],
            linewidth=0,
            antialiased=False,
            shade=False,
            rasterized=True,
        )
        self.axes.set_xlim(x[0], x[-1])
        self.axes.set_ylim(y[0], y[-1])
        small = self.axes.figure.get_figwidth() / self.axes.get_gridspec().ncols < _SMALL
        for axis in (self.axes.xaxis, self.axes.yaxis):
            axis.set_major_locator(MaxNLocator(3 if small else 5, integer=True))

    @_under_style
    def ticks(self, axis: Literal["x", "y", "z"], places: Sequence[float], texts: Sequence[str]) -> None:
        target = getattr(self.axes, f"{axis}axis")
        target.set_major_locator(FixedLocator(list(places)))
        target.set_minor_locator(NullLocator())
        getattr(self.axes, f"set_{axis}ticklabels")([plain(text) for text in texts])
        longest = max(map(len, texts), default=0)
        if hasattr(self.axes, "zaxis"):
            target.labelpad += 1.6 * longest
            for label in target.get_ticklabels():
                label.set_horizontalalignment("left")
        elif axis == "x" and longest > 4:
            inches = self.axes.figure.get_figwidth() * 0.8 / self.axes.get_gridspec().ncols
            if (longest + 1) * len(texts) * 0.62 * 8 / _INCH > inches:
                self.axes.tick_params(axis="x", labelrotation=90)

    @_under_style
    def marks(self, x: Sequence[float], texts: Sequence[str]) -> None:
        low, high = self.axes.get_xlim()
        inches = self.axes.figure.get_figwidth() * 0.8 / self.axes.get_gridspec().ncols
        gap = (max(map(len, texts), default=1) + 1.2) * 0.62 * 6.5 / _INCH / inches * (high - low)
        for place, where, text in zip(x, spread(list(x), gap, low, high), texts, strict=True):
            self.axes.annotate(
                plain(text),
                (place, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(where, 1.055),
                textcoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=6.5,
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "linewidth": 0.5,
                    "color": self.style.grey,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
        if texts:
            self._raise_title(14)

    @_under_style
    def annotate(self, x: float, y: float, text: str, *, centred: bool = False) -> None:
        if centred:
            self.axes.text(x, y, plain(text), ha="center", va="center", fontsize=7)
            return
        self.axes.annotate(
            plain(text),
            (x, y),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=6.5,
            color=self.style.grey,
        )

    def limits(self, axis: Literal["x", "y", "z"], low: float, high: float) -> None:
        getattr(self.axes, f"set_{axis}lim")(low, high)

    @_under_style
    def legend(self) -> None:
        handles, labels = self.axes.get_legend_handles_labels()
        grid = self.axes.get_gridspec()
        room = self.axes.figure.get_figwidth() * _INCH * 0.86 / grid.ncols
        columns = fitting(labels, room)
        self.axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.1, borderpad=0.2
        )
        self._raise_title(_LINE * -(-len(handles) // columns))


class Canvas:
    """One Figure, laid out so that labels keep clear of each other."""

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
        self.style = style
        self.three_dimensional = three_dimensional
        self._begin(rows, columns, (width, height), share_y)

    @_under_style
    def _begin(self, rows: int, columns: int, size: tuple[float, float], share_y: bool) -> None:
        engine = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0.03, hspace=0.04)
        self.figure = Figure(figsize=size, layout=engine)
        FigureCanvasAgg(self.figure)
        projection = {"projection": "3d"} if self.three_dimensional else {}
        self.axes = self.figure.subplots(
            rows, columns, squeeze=False, sharey="row" if share_y else False, subplot_kw=projection
        )

    @_under_style
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
        axes = self.axes[row, column]
        panel = Panel(axes, self.style)
        panel.head(title, subtitle)
        axes.set_xlabel(plain(x_label))
        axes.set_ylabel(plain(y_label))
        axes.set_xscale(x_scale)
        axes.set_yscale(y_scale)
        for axis, scale in ((axes.xaxis, x_scale), (axes.yaxis, y_scale)):
            if scale == "log":
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                axis.set_minor_formatter(_PlainMinor())
        if x_scale == "log":
            axes.xaxis.set_major_locator(LogLocator(numticks=6))
        if self.three_dimensional:
            self._corner_view(axes, z_label)
        return panel

    def _corner_view(self, axes: Any, z_label: str) -> None:
        """From above a corner, the floor nearly empty of lines, labels close to their axes."""
        axes.view_init(elev=28, azim=-52)
        axes.set_box_aspect((1.25, 1.0, 0.8), zoom=1.12)
        axes.set_zlabel(plain(z_label), labelpad=-6)
        axes.xaxis.labelpad = axes.yaxis.labelpad = -6
        axes.zaxis.set_major_locator(MaxNLocator(4))
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_pane_color((1.0, 1.0, 1.0, 0.0))
            axis.line.set_linewidth(0.5)
        axes.tick_params(pad=-3, labelsize=6)

    @_under_style
    def legend(self, panel: Panel) -> None:
        handles, labels = panel.axes.get_legend_handles_labels()
        columns = fitting(labels, self.figure.get_figwidth() * _INCH * 0.97)
        self.figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderpad=0.2)

    @_under_style
    def colour_bar(self, panels: Sequence[Panel], *, scale: ColourScale, colour_map: str, label: str) -> None:
        mappable = mpl.cm.ScalarMappable(norm_of(scale), colour_map_of(colour_map))
        bar = self.figure.colorbar(
            mappable, ax=[panel.axes for panel in panels], aspect=24, pad=0.015, fraction=0.05
        )
        bar.set_label(plain(label))
        bar.outline.set_linewidth(0.5)
        ticks = scale.ticks()
        bar.set_ticks(ticks, labels=[f"{tick:,g}" for tick in ticks])
        bar.ax.minorticks_off()

    @_under_style
    def caption(self, text: str) -> None:
        size = self.style.caption_size
        lines = wrapped(plain(text), size, self.figure.get_figwidth() * _INCH * 0.975)
        extra = (len(lines) * size * 1.3 + 6) / _INCH
        width, height = self.figure.get_size_inches()
        self.figure.set_size_inches(width, height + extra)
        self.figure.supxlabel(
            "\n".join(lines), x=0.008, ha="left", fontsize=size, color=self.style.grey, linespacing=1.25
        )

    def finish(self, dataset: xr.Dataset) -> Figure:
        return self.figure

    @_under_style
    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.figure.savefig(path, metadata=file_metadata(path.suffix.lower(), metadata))


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
    """A grid of Axes."""
    return Canvas(
        rows,
        columns,
        width=width,
        height=height,
        style=style,
        three_dimensional=three_dimensional,
        share_y=share_y,
    )
