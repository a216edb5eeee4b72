"""What figures look like: one :class:`Style` holds the matplotlib settings and their plotly twin.

Swap it with ``figures.draw(..., style=my_style)``, where ``my_style`` is a :class:`Style` (make one
with ``dataclasses.replace(osp_diag.figures.styles.PAPER, ...)``) or the name of a module of this package.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from osp_diag.errors import UsageError
from osp_diag.figures._colours import sample
from osp_diag.wording import did_you_mean

__all__ = ["RUN_COLOURS", "Style", "load_style"]

RUN_COLOURS = ("#396a9a", "#e17a0a", "#12a696", "#c80c1f", "#ad7af4", "#8e09f7")
"""Of runs shown together, by their place, so that a run keeps its colour from page to page.

Found by a search over colours that stand out from white and from the dark ground of our pages (contrast of 3
and more): the six whose closest pair lies farthest apart, also as protanopes, deuteranopes and tritanopes see
them (0.12 in OKLab; Okabe and Ito's come to 0.08 so, and two of theirs fade on white).
"""


@dataclass(frozen=True, kw_only=True)
class Style:
    """Fonts, widths and colours of a figure in both backends."""

    name: str
    matplotlib: Mapping[str, Any]
    """rcParams"""
    plotly: Mapping[str, Any]
    """``layout`` of a plotly template: the twin of the rcParams on a screen"""
    widths: Mapping[str, float]
    """inches by name of the width"""
    pixels_per_inch: float
    """of the plotly twin"""
    palette: tuple[str, ...]
    """lines of a few kinds, told apart by lightness too"""
    run_colours: tuple[str, ...] = RUN_COLOURS
    """lines of runs, in the order in which they are given"""
    magnitude_map: str
    """sequential map of heat maps of a magnitude, dark at 0"""
    share_map: str
    """sequential map of heat maps of a share in [0, 1], light at 0"""
    surface_map: str
    """blue to red, for surfaces"""
    grey: str = "#5c5c5c"
    caption_size: float = 6.5
    """points; the caption says what determines the numbers"""

    def at_places(self, places: Iterable[int]) -> Style:
        """The style for some of the runs that are shown together: each has the colour of its place."""
        colours = tuple(self.run_colours[place % len(self.run_colours)] for place in places)
        return replace(self, run_colours=colours) if len(set(colours)) == len(colours) else self

    def colours_of_runs(self, count: int) -> tuple[str, ...]:
        """The colours of ``count`` runs; of more than there are colours, shades of a map."""
        shades = () if count <= len(self.run_colours) else sample("batlow", count, 0.02, 0.78)
        return tuple(shades) or self.run_colours[:count]


def load_style(style: Style | str) -> Style:
    """A style as it is, or by its name."""
    if isinstance(style, Style):
        return style
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if style not in names:
        raise UsageError(f"no figure style is named {style!r}; {did_you_mean(style, names)}")
    loaded: Style = importlib.import_module(f"{__name__}.{style}").STYLE
    return loaded
