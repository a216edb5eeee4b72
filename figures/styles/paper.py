"""The default style: for the columns of a paper, readable at printed size."""

from __future__ import annotations

from osp_diag.figures._colours import sample
from osp_diag.figures.styles import Style

_FONTS = ["DejaVu Sans", "Arial", "Helvetica"]
_INK = "#262626"
_GRID = "#dddddd"
_AXIS = {
    "gridcolor": _GRID,
    "linecolor": _INK,
    "ticks": "outside",
    "showline": True,
    "zeroline": False,
    "title": {"font": {"size": 13}},
    "tickfont": {"size": 12},
}

STYLE = Style(
    name="paper",
    matplotlib={
        "figure.dpi": 150,
        "savefig.dpi": 300,
        "figure.facecolor": "white",
        "font.family": "sans-serif",
        "font.sans-serif": _FONTS,
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.4,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.minor.width": 0.4,
        "ytick.minor.width": 0.4,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
        "xtick.minor.size": 1.5,
        "ytick.minor.size": 1.5,
        "lines.linewidth": 1.3,
        "lines.markersize": 3,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.2,
        "legend.handletextpad": 0.5,
        "image.interpolation": "nearest",
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "svg.fonttype": "path",
        "svg.hashsalt": "osp_diag",
    },
    plotly={
        "font": {
            "family": ", ".join(["DejaVu Sans", "Verdana", "Arial", "sans-serif"]),
            "size": 13,
            "color": _INK,
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hoverlabel": {"font": {"size": 12}},
    },
    widths={"one-column": 3.35, "two-column": 6.9},
    pixels_per_inch=145,
    palette=tuple(sample("batlow", 4, 0.02, 0.78)),
    magnitude_map="batlow",
    share_map="lipari_r",
    surface_map="vik:0.08:0.86",
)
