"""The primitives in matplotlib: PNG, PDF and SVG at the width of a paper's column.

Figures are made without pyplot, so that nothing global is touched and nothing has to be closed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, LogLocator, MaxNLocator, NullLocator

from osp_diag.figures._colours import ColourScale, colour_table
from osp_diag.figures._decimate import counts_few, spread
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


def _colour_map(name: str) -> Colormap:
    return ListedColormap(colour_table(name), name=name).with_extremes(bad="#ffffff")


def _norm(scale: ColourScale) -> Normalize:
    if scale.kind == "log":
        return LogNorm(scale.low, scale.high, clip=True)
    if scale.kind == "symlog":
        return SymLogNorm(scale.threshold, vmin=scale.low, vmax=scale.high, clip=True)
    return Normalize(scale.low, scale.high, clip=True)


def _edges(centres: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " edge"]:
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    # Half-way between centres; the outermost as far beyond the last centre as the edge before it.
    between = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - between[0]], between, [2 * centres[-1] - between[-1]]])


@cache
def _glyphs(family: str) -> frozenset[int]:
    return frozenset(get_font(findfont(family)).get_charmap())


def _plain(text: str) -> str:
    """Text to be shown as it is: no mathematics between dollars, a box where the font has no glyph."""
    glyphs = _glyphs(mpl.rcParams["font.sans-serif"][0])
    printable = "".join(c if c == "\n" or ord(c) in glyphs else "\u25a1" for c in text)
    return printable.replace("$", r"\$")


def _legend_columns(labels: Sequence[str], room: float) -> int:
    """How many columns of a legend fit into ``room`` points."""
    size = FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points()
    dressing = (mpl.rcParams["legend.handlelength"] + mpl.rcParams["legend.columnspacing"] + 0.6) * size
    widest = max((_width(label, size) for label in labels), default=0.0) + dressing
    # matplotlib makes the columns of several rows as wide as the widest entry.
    total = sum(_width(label, size) + dressing for label in labels)
    return max(1, len(labels) if total <= room else int(room // widest))


def _width(text: str, size: float) -> float:
    """Points that a line of text takes."""
    font = FontProperties(family=mpl.rcParams["font.family"], size=size)
    return float(text_to_path.get_text_width_height_descent(text.replace("\\$", "$"), font, ismath=False)[0])


def _wrapped(text: str, size: float, room: float) -> list[str]:
    """Lines of at most ``room`` points, measured in the font itself."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _file_metadata(suffix: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Title and caption under the names of the format; no date, so that equal figures are equal files."""
    title, caption = metadata["title"], metadata["caption"]
    if suffix == ".pdf":
        return {"Title": title, "Subject": caption, "Creator": "osp_diag", "CreationDate": None}
    if suffix == ".svg":
        return {"Title": title, "Description": caption, "Creator": "osp_diag", "Date": None}
    return {"Title": title, "Description": caption, "Software": "osp_diag"}


class Panel:
    """One Axes."""

    def __init__(self, axes: Any, style: Style) -> None:
        self.axes = axes
        self.style = style
        self.title = ""

    def head(self, title: str, subtitle: str) -> None:
        """Title in bold, and under it in plain what is special to the panel."""
        self.title = _plain(title)
        if subtitle:
            self.axes.annotate(
                _plain(subtitle),
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
        self.axes.plot(x, y, label=_plain(label), color=colour, linestyle=_DASHES[dash], marker=mark)
        if self.axes.get_xscale() == "linear" and counts_few(x):
            self.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if lower is not None and upper is not None:
            self.axes.fill_between(x, lower, upper, color=colour, alpha=0.18, linewidth=0)

    @_under_style
    def level(self, value: float, text: str) -> None:
        self.axes.axhline(value, color=self.style.grey, linewidth=0.7, linestyle=(0, (2, 1.5)), zorder=1)
        self.axes.annotate(
            _plain(text),
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
        self.axes.scatter(x, y, label=_plain(label), color=colour, s=9, linewidths=0, zorder=3)

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
        left, right = _edges(x)[[0, -1]]
        bottom, top = _edges(y)[[0, -1]]
        clipped = np.maximum(values, scale.low) if scale.kind == "log" else values
        self.axes.imshow(
            np.ma.masked_invalid(clipped),
            norm=_norm(scale),
            cmap=_colour_map(colour_map),
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
        # A face has the colour of its highest corner, so that a spike keeps its own.
        corners = [values[:-1, :-1], values[1:, :-1], values[:-1, 1:], values[1:, 1:]]
        colours = _colour_map(colour_map)(scale.fraction(np.fmax.reduce(corners)))
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
        getattr(self.axes, f"set_{axis}ticklabels")([_plain(text) for text in texts])
        longest = max(map(len, texts), default=0)
        if hasattr(self.axes, "zaxis"):
            target.labelpad += 1.6 * longest
            for label in target.get_ticklabels():
                label.set_horizontalalignment("left")
        elif axis == "x" and longest > 4:
            # Texts that would touch stand upright; a letter is about 0.62 of its size wide.
            inches = self.axes.figure.get_figwidth() * 0.8 / self.axes.get_gridspec().ncols
            if (longest + 1) * len(texts) * 0.62 * 8 / _INCH > inches:
                self.axes.tick_params(axis="x", labelrotation=90)

    @_under_style
    def marks(self, x: Sequence[float], texts: Sequence[str]) -> None:
        low, high = self.axes.get_xlim()
        inches = self.axes.figure.get_figwidth() * 0.8 / self.axes.get_gridspec().ncols
        # The width of the longest text at 6.5 points, in the units of the axis.
        gap = (max(map(len, texts), default=1) + 1.2) * 0.62 * 6.5 / _INCH / inches * (high - low)
        for place, where, text in zip(x, spread(list(x), gap, low, high), texts, strict=True):
            self.axes.annotate(
                _plain(text),
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
            self.axes.text(x, y, _plain(text), ha="center", va="center", fontsize=7)
            return
        self.axes.annotate(
            _plain(text),
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
        columns = _legend_columns(labels, room)
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
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))
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
        axes.set_zlabel(_plain(z_label), labelpad=-6)
        axes.xaxis.labelpad = axes.yaxis.labelpad = -6
        axes.zaxis.set_major_locator(MaxNLocator(4))
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_pane_color((1.0, 1.0, 1.0, 0.0))
            axis.line.set_linewidth(0.5)
        axes.tick_params(pad=-3, labelsize=6)

    @_under_style
    def legend(self, *panels: Panel) -> None:
        handles, labels = [], []
        for panel in panels:
            panel_handles, panel_labels = panel.axes.get_legend_handles_labels()
            handles += panel_handles
            labels += panel_labels
        columns = _legend_columns(labels, self.figure.get_figwidth() * _INCH * 0.97)
        self.figure.legend(handles, labels, loc="outside upper left", ncols=columns, borderpad=0.2)

    @_under_style
    def colour_bar(self, panels: Sequence[Panel], *, scale: ColourScale, colour_map: str, label: str) -> None:
        mappable = mpl.cm.ScalarMappable(_norm(scale), _colour_map(colour_map))
        bar = self.figure.colorbar(
            mappable, ax=[panel.axes for panel in panels], aspect=24, pad=0.015, fraction=0.05
        )
        bar.set_label(_plain(label))
        bar.outline.set_linewidth(0.5)
        ticks = scale.ticks()
        bar.set_ticks(ticks, labels=[f"{tick:,g}" for tick in ticks])
        bar.ax.minorticks_off()

    @_under_style
    def caption(self, text: str) -> None:
        size = self.style.caption_size
        lines = _wrapped(_plain(text), size, self.figure.get_figwidth() * _INCH * 0.975)
        # The caption is added to the figure's height and takes nothing from the panels.
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
        self.figure.savefig(path, metadata=_file_metadata(path.suffix.lower(), metadata))


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
