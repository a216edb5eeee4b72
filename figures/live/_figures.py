"""The registry's figures on the page: the one that a reader asks for, of the runs that are chosen."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import OspDiagError
from osp_diag.figures._registry import in_report, names, summaries
from osp_diag.figures.report.pictures import page_picture
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.run import Run

__all__ = ["REST", "AskedFigures", "PageFigure", "figure_options", "picture_of"]

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
    lines = summaries()
    order = sorted(names(), key=lambda name: (in_report(name).place, name))
    return [{"label": in_report(name).heading or lines[name].line, "value": name} for name in order]


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
        name, places = asked
        version, labels = self._version(asked), labels_of(self.runs)
        left_out: list[str] = []
        moments: dict[int, Run] = {}
        fewest = in_report(name).fewest_steps
        for place in places:
            try:
                moment = self.runs[place].moment()
                if len(moment.steps) < fewest:
                    left_out.append(f"{labels[place]}: it needs {fewest} probed steps")
                else:
                    moments[place] = moment
            except OspDiagError as reason:
                left_out.append(f"{labels[place]}: {reason}")
        picture, caption = None, ""
        try:
            picture, caption = picture_of(name, moments, labels, left_out)
        except Exception as error:  # the page goes on, and says so
            kind = type(error).__name__
            left_out.append(f"it cannot be drawn ({kind}: {error}); this is a defect of osp-diag")
        return PageFigure(version, picture, caption, tuple(left_out))


def picture_of(
    name: str,
    runs: dict[int, Run],
    labels: Sequence[str],
    left_out: list[str],
    diagnoses: Mapping[int, Diagnosis] | None = None,
) -> tuple[dict[str, Any] | None, str]:
    """The figure of all runs that it can be drawn of, and its caption; why not of others goes to left_out."""
    pairs = in_report(name).pairs
    if pairs:
        runs = dict(list(runs.items())[:2])
    if not runs:
        return None, ""
    try:
        picture, dataset = page_picture(name, runs, diagnoses)
        return picture, str(dataset.attrs["caption"])
    except OspDiagError as reason:
        problem = str(reason)
    if len(runs) == 1 or pairs:
        left_out.append(problem)
        return None, ""
    fitting = {}
    for place, run in runs.items():
        try:
            page_picture(name, {place: run}, diagnoses)
            fitting[place] = run
        except OspDiagError as reason:
            left_out.append(f"{labels[place]}: {reason}")
    if len(fitting) == len(runs):
        left_out.append(f"side by side: {problem}")
        return None, ""
    return picture_of(name, fitting, labels, left_out, diagnoses)
