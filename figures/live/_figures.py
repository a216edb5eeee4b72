"""The registry's figures on the page: the one that a reader asks for, of the runs that are chosen."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import OspDiagError
from osp_diag.figures._placement import InReport
from osp_diag.figures._registry import figure_module, in_report, names
from osp_diag.figures.report.shown_figures import page_picture
from osp_diag.figures.styles import RUN_COLOURS, Style, load_style
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.run import Run

__all__ = ["AskedFigures", "PageFigure", "figure_options"]

MOST_STORED = 12
"""Figures that are at hand for other browsers, and for a reader who comes back."""
REST = 4.0
"""A figure that grows with its run rests so many times as long as it took to draw."""


@dataclass(frozen=True)
class PageFigure:
    """A figure as plotly's dictionary, or the reasons why there is none."""

    version: str
    """of the runs that it was drawn of"""
    picture: dict[str, Any] | None
    caption: str
    left_out: tuple[str, ...]
    """why it is not drawn, or not of some runs"""


def figure_options() -> list[dict[str, str]]:
    """Every figure of the registry: what it shows, in the order of the report."""
    listed = sorted(names(), key=lambda name: (in_report(name).place, name))
    return [{"label": _title(name), "value": name} for name in listed]


def _title(name: str) -> str:
    line = (figure_module(name).__doc__ or name).splitlines()[0].rstrip(".")
    return in_report(name).heading or line


class AskedFigures:
    """Draws figures for all browsers that look at a page, one at a time, and not without pause."""

    def __init__(self, runs: Sequence[FollowedRun]) -> None:
        self.runs = list(runs)
        self._drawing = threading.Lock()
        self._drawn: OrderedDict[tuple[str, tuple[int, ...]], tuple[PageFigure, float]] = OrderedDict()
        """(name, places of the runs) → the figure, and until when it rests"""

    def answer(self, name: str, places: tuple[int, ...]) -> PageFigure | None:
        """The figure of these runs as they are now, or were a moment ago; None: another is being drawn."""
        asked = (name, places)
        if asked in self._drawn:
            figure, rests_until = self._drawn[asked]
            if figure.version == self._version(asked) or time.monotonic() < rests_until:
                return figure
        if not self._drawing.acquire(blocking=False):
            return None
        try:
            begun = time.monotonic()
            figure = self._draw(asked)
            ended = time.monotonic()
            self._drawn[asked] = figure, ended + REST * (ended - begun)
            self._drawn.move_to_end(asked)
            if len(self._drawn) > MOST_STORED:
                self._drawn.popitem(last=False)
            return figure
        finally:
            self._drawing.release()

    def _version(self, asked: tuple[str, tuple[int, ...]]) -> str:
        return repr((asked, [self.runs[place].version for place in asked[1]]))

    def _draw(self, asked: tuple[str, tuple[int, ...]]) -> PageFigure:
        """Of the moment that was last looked at: the page goes on meanwhile."""
        version = self._version(asked)
        name, places = asked
        labels = labels_of(self.runs)
        left_out: list[str] = []
        moments: dict[int, Run] = {}
        placement = in_report(name)
        for place in places:
            try:
                moments[place] = self.runs[place].moment()
                if len(moments[place].steps) < placement.fewest_steps:
                    del moments[place]
                    left_out.append(f"{labels[place]}: it needs {placement.fewest_steps} probed steps")
            except OspDiagError as reason:
                left_out.append(f"{labels[place]}: {reason}")
        picture, caption = None, ""
        try:
            picture, caption = _picture(name, placement, moments, labels, left_out)
        except Exception as error:  # the page goes on, and says so
            kind = type(error).__name__
            left_out.append(f"it cannot be drawn ({kind}: {error}); this is a defect of osp-diag")
        return PageFigure(version, picture, caption, tuple(left_out))


def _picture(
    name: str, placement: InReport, runs: dict[int, Run], labels: Sequence[str], left_out: list[str]
) -> tuple[dict[str, Any] | None, str]:
    """The figure of all runs that it can be drawn of, and its caption; why not of others goes to left_out."""
    if placement.pairs:
        runs = dict(list(runs.items())[:2])
    if not runs:
        return None, ""
    try:
        picture, dataset = page_picture(name, placement, list(runs.values()), _style(runs))
        return picture, str(dataset.attrs["caption"])
    except OspDiagError as reason:
        problem = str(reason)
    if len(runs) == 1 or placement.pairs:
        left_out.append(problem)
        return None, ""
    fitting = {}
    for place, run in runs.items():
        try:
            page_picture(name, placement, [run], _style(runs))
            fitting[place] = run
        except OspDiagError as reason:
            left_out.append(f"{labels[place]}: {reason}")
    if len(fitting) == len(runs):
        left_out.append(f"side by side: {problem}")
        return None, ""
    return _picture(name, placement, fitting, labels, left_out)


def _style(places: Iterable[int]) -> Style:
    """The paper's, with the colours that these runs have all over the page."""
    colours = tuple(RUN_COLOURS[place % len(RUN_COLOURS)] for place in places)
    return replace(load_style("paper"), run_colours=colours)
