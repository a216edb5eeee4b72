"""The figures of a report: each of the registry, as its file says that it stands there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xarray as xr

from osp_diag.analyses.thinned_run import thinned_run
from osp_diag.errors import OspDiagError
from osp_diag.figures._placement import InReport
from osp_diag.figures._registry import figure_module, in_report, names
from osp_diag.figures.backend import load_backend
from osp_diag.figures.report.comparison import alike, pairs_alike
from osp_diag.figures.report.encoding import compacted, factored
from osp_diag.figures.styles import load_style

__all__ = ["Drawn", "draw_figures", "page_picture", "shown_figures"]


@dataclass
class Drawn:
    """A figure as plotly's JSON: of all runs that it can be drawn of, and of each alone."""

    name: str
    heading: str
    caption: str = ""
    variants: dict[str, Any] = field(default_factory=dict)
    """"all", and the place of each run; values have ``data``, ``layout`` and ``caption``, or name another"""
    left_out: list[str] = field(default_factory=list)
    """why it is not drawn, or not of some runs"""


def draw_figures(runs: Sequence[Any], labels: Sequence[str]) -> list[Drawn]:
    """Every figure that the page shows, in its order.

    What cannot be drawn has no variants, and says why in ``left_out``.
    """
    drawn = []
    for name, placement in shown_figures().items():
        if placement.pairs:
            drawn += _pairs(name, placement, runs, labels)
        else:
            drawn += [_together(name, placement, runs, labels, group) for group in _groups(runs)]
    return drawn


def shown_figures() -> dict[str, InReport]:
    """How the figures stand that the page shows, in its order: all but those that its linked charts show."""
    placements = {name: in_report(name) for name in names()}
    order = sorted(placements, key=lambda name: (placements[name].place, name))
    return {name: placements[name] for name in order if not placements[name].linked_charts}


def _groups(runs: Sequence[Any]) -> list[list[int]]:
    """Places of runs that are drawn side by side: models alike; each of the others by itself."""
    groups = alike(runs)
    rest = [[place] for place in range(len(runs)) if not any(place in group for group in groups)]
    return sorted([*groups, *rest])


def _together(
    name: str, placement: InReport, runs: Sequence[Any], labels: Sequence[str], group: Sequence[int]
) -> Drawn:
    found = Drawn(name, placement.heading)
    fitting: dict[int, Any] = {}
    for index in group:
        run = runs[index]
        try:
            if len(run.steps) < placement.fewest_steps:
                found.left_out.append(
                    f"{labels[index]}: it needs {placement.fewest_steps} probed steps, and there is one"
                )
                continue
            _draw(placement, {index: run}, found, str(index))
            fitting[index] = run
        except OspDiagError as reason:
            found.left_out.append(f"{labels[index]}: {reason}")
    if len(fitting) > 1:
        try:
            _draw(placement, fitting, found, "all")
        except OspDiagError as reason:
            found.left_out.append(f"side by side: {reason}")
    elif fitting:
        found.variants["all"] = next(iter(found.variants))
    if len(group) < len(runs):
        found.heading += f": {', '.join(labels[place] for place in group)}"
    return found


def _pairs(name: str, placement: InReport, runs: Sequence[Any], labels: Sequence[str]) -> list[Drawn]:
    """One for each pair that the page compares."""
    drawn = []
    for first, second in pairs_alike(runs):
        both = f"{labels[first]} and {labels[second]}"
        found = Drawn(name, f"{placement.heading}: {both}")
        try:
            _draw(placement, {first: runs[first], second: runs[second]}, found, "all")
        except OspDiagError as reason:
            found.left_out.append(f"{both}: {reason}")
        drawn.append(found)
    return drawn


def _draw(placement: InReport, runs: Mapping[int, Any], found: Drawn, variant: str) -> None:
    """Of runs by their places on the page."""
    found.variants[variant], dataset = page_picture(found.name, runs)
    for trace in found.variants[variant]["data"]:
        if "text" in trace:
            trace["text"] = factored(trace["text"])
    step = _step_shown(placement, list(runs.values()))
    found.variants[variant]["caption"] = step + str(dataset.attrs["caption"])
    found.heading = found.heading or str(dataset.attrs["title"])


def page_picture(name: str, runs: Mapping[int, Any]) -> tuple[dict[str, Any], xr.Dataset]:
    """A figure as ``figures.draw`` does it, but for the caption, which a page sets in its own type.

    Parameters
    ----------
    runs : by their places on the page, which give them their colours

    Returns
    -------
    ``data`` and ``layout`` for plotly, made small; and what was drawn, with the caption in its attrs
    """
    figure, placement = figure_module(name), in_report(name)
    most = placement.most_steps
    shown = [run if most is None else thinned_run(run, most) for run in runs.values()]
    dataset = figure.prepare(shown, **placement.options)
    style = load_style("paper").at_places(runs)
    canvas = figure.draw(dataset, load_backend("plotly"), style=style, width="two-column")
    picture = canvas.finish(dataset).to_plotly_json()
    return compacted({"data": picture["data"], "layout": picture["layout"]}), dataset


def _step_shown(placement: InReport, runs: Sequence[Any]) -> str:
    """What step a figure is of that neither runs over the steps nor follows the page's slider."""
    if placement.fewest_steps > 1 or all(len(run.steps) == 1 for run in runs):
        return ""
    which, place = ("first", 0) if placement.raw_activations else ("last", -1)
    steps = [f"{int(run.steps[place]):,}" for run in runs]
    said = f" ({steps[0]})" if len(set(steps)) == 1 else f" of each run ({', '.join(steps)})"
    return f"Of the {which} probed step{said}, wherever the step slider stands. "
