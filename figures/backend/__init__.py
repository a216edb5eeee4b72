"""What a figure may ask of a drawing library: few primitives, each implemented once per backend.

A figure calls ``backend.canvas(...)``, then ``canvas.panel(row, column)`` for each set of axes, and
draws on the panels. It never names matplotlib or plotly. Colours are ``#rrggbb``; sizes are inches and
points. The ``none`` backend draws nothing: it records the calls and returns the data. Why primitives:
docs/decisions.md, Figures.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xarray as xr
from jaxtyping import Float

from osp_diag.errors import UsageError
from osp_diag.figures._colours import ColourScale
from osp_diag.figures.styles import Style

Dash = Literal["solid", "dashed", "dotted", "dashdot"]
AxisScale = Literal["linear", "log"]

BACKENDS = ("matplotlib", "plotly", "none")
SUFFIXES = {".png": "matplotlib", ".pdf": "matplotlib", ".svg": "matplotlib", ".html": "plotly"}

__all__ = [
    "BACKENDS",
    "SUFFIXES",
    "AxisScale",
    "Backend",
    "Canvas",
    "Dash",
    "Panel",
    "backend_for",
    "load_backend",
]


class Panel(Protocol):
    """One set of axes."""

    def line(
        self,
        x: Float[np.ndarray, " point"],
        y: Float[np.ndarray, " point"],
        *,
        label: str,
        colour: str,
        dash: Dash = "solid",
        lower: Float[np.ndarray, " point"] | None = None,
        upper: Float[np.ndarray, " point"] | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """A line, broken where y is NaN, with a band from ``lower`` to ``upper`` if they are given.

        ``texts`` are what a page calls its points in place of their x.
        """

    def level(self, value: float, text: str) -> None:
        """A thin horizontal line across the panel with its text on it."""

    def scatter(
        self,
        x: Float[np.ndarray, " point"],
        y: Float[np.ndarray, " point"],
        *,
        label: str,
        colour: str,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Points; ``texts`` are what a page calls them in place of their x."""

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
        """Cells centred on x and y; NaN cells are left empty.

        ``x_texts`` and ``y_texts`` are what a page says at the pointer in place of their numbers.
        """

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
        """A surface over the plane; the panel must be three-dimensional. No point is left out."""

    def ticks(self, axis: Literal["x", "y", "z"], places: Sequence[float], texts: Sequence[str]) -> None:
        """Tick labels, taken literally (no markup)."""

    def marks(self, x: Sequence[float], texts: Sequence[str]) -> None:
        """Labels above the panel that point at places on its x axis and keep clear of each other."""

    def annotate(self, x: float, y: float, text: str, *, centred: bool = False) -> None:
        """Text beside a point, or with its middle on it."""

    def limits(self, axis: Literal["x", "y", "z"], low: float, high: float) -> None:
        """The range of an axis."""

    def legend(self) -> None:
        """The labels of lines and points, in one row above the panel."""


class Canvas(Protocol):
    """A figure being drawn: a grid of panels, colour bars and a caption."""

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
        x_scale: AxisScale = "linear",
        y_scale: AxisScale = "linear",
    ) -> Panel:
        """The axes at a place of the grid."""

    def legend(self, *panels: Panel) -> None:
        """The labels of these panels, which hold for all others too, above the whole figure."""

    def colour_bar(self, panels: Sequence[Panel], *, scale: ColourScale, colour_map: str, label: str) -> None:
        """One bar at the right of ``panels``, which share its scale."""

    def caption(self, text: str) -> None:
        """Small print under the whole figure; it goes into the file's metadata too."""

    def finish(self, dataset: xr.Dataset) -> Any:
        """The native figure (or, from ``none``, the data)."""

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file."""


class Backend(Protocol):
    """A drawing library. The modules of this package that satisfy it are named in ``BACKENDS``."""

    def canvas(
        self,
        rows: int,
        columns: int,
        *,
        width: float,
        height: float,
        style: Style,
        three_dimensional: bool = False,
        share_y: bool = False,
    ) -> Canvas:
        """An empty grid of ``width`` × ``height`` inches (the caption comes on top of that)."""


def load_backend(name: str) -> Backend:
    """The backend module of that name, imported only now."""
    if name not in BACKENDS:
        raise UsageError(f"no figure backend is named {name!r}; there are {', '.join(BACKENDS)}")
    try:
        module: Any = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"the {name} backend needs the package {missing.name!r}: pip install {missing.name}"
        ) from None
    backend: Backend = module
    return backend


def backend_for(out: Path | None, backend: str | None) -> str:
    """Which backend writes this file; they have to agree if both are given."""
    if out is None:
        return backend or "matplotlib"
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"cannot write a figure as {out.name!r}: its suffix has to be .png, .pdf or .svg (matplotlib) "
            f"or .html (plotly, interactive)"
        )
    if backend not in (None, SUFFIXES[suffix]):
        raise UsageError(
            f"{out.name!r} is written by the {SUFFIXES[suffix]} backend, not by {backend}; "
            f"change the suffix or leave the backend out"
        )
    return SUFFIXES[suffix]
