"""The figures of a report: each of the registry, as its file says that it stands there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xarray as xr

from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.analyses.thinned_run import thinned_run
from osp_diag.errors import OspDiagError
from osp_diag.figures._placement import InReport
from osp_diag.figures._registry import figure_module, in_report, names
from osp_diag.figures.backend import load_backend
from osp_diag.figures.report.comparison import alike, pairs_alike
from osp_diag.figures.report.encoding import compacted, factored
from osp_diag.figures.styles import load_style
from osp_diag.runs.run import Run

__all__ = ["Picture", "draw_figures", "page_picture", "reason_of", "report_figures"]


@dataclass
class Picture:
    """A figure as plotly's JSON: of all runs that it can be drawn of, and of each alone."""

    name: str
    heading: str
    caption: str = ""
    variants: dict[str, Any] = field(default_factory=dict)
    """"all", and the place of each run; values have ``data``, ``layout`` and ``caption``, or name another"""
    left_out: list[str] = field(default_factory=list)
    """why it is not drawn, or not of some runs"""


def draw_figures(
    runs: Sequence[Run], labels: Sequence[str], diagnoses: Mapping[int, Diagnosis]
) -> list[Picture]:
    """Every figure that the page shows, in its order.

    What cannot be drawn has no variants, and says why in ``left_out``.

    Parameters
    ----------
    diagnoses : by the place of the run; figures of a diagnosis are drawn of these runs alone
    """
    pictures = []
    for name, placement in report_figures().items():
        if placement.pairs:
            pictures += _pairs(name, placement, runs, labels)
        else:
            pictures += [
                _together(name, placement, runs, labels, group, diagnoses) for group in _groups(runs)
            ]
    return pictures


def report_figures() -> dict[str, InReport]:
    """How the figures stand that the page shows, in its order: all but those that its linked charts show."""
    placements = {name: in_report(name) for name in names()}
    order = sorted(placements, key=lambda name: (placements[name].place, name))
    return {name: placements[name] for name in order if not placements[name].linked_charts}


def _groups(runs: Sequence[Run]) -> list[list[int]]:
    """Places of runs that are drawn side by side: models alike; each of the others by itself."""
    groups = alike(runs)
    rest = [[place] for place in range(len(runs)) if not any(place in group for group in groups)]
    return sorted([*groups, *rest])


def _together(
    name: str,
    placement: InReport,
    runs: Sequence[Run],
    labels: Sequence[str],
    group: Sequence[int],
    diagnoses: Mapping[int, Diagnosis],
) -> Picture:
    picture = Picture(name, placement.heading)
    fitting: dict[int, Run] = {}
    for index in group:
        run = runs[index]
        try:
            if len(run.steps) < placement.fewest_steps:
                there = "is one" if len(run.steps) == 1 else f"are {len(run.steps)}"
                picture.left_out.append(
                    f"{labels[index]}: it needs {placement.fewest_steps} probed steps, and there {there}"
                )
                continue
            if placement.diagnosis and index not in diagnoses:
                picture.left_out.append(f"{labels[index]}: there is no diagnosis of it")
                continue
            _draw(placement, {index: run}, picture, str(index), diagnoses)
            fitting[index] = run
        except Exception as error:  # one figure that fails takes nothing else off the page
            picture.left_out.append(f"{labels[index]}: {reason_of(error)}")
    if len(fitting) > 1:
        try:
            _draw(placement, fitting, picture, "all", diagnoses)
        except Exception as error:
            picture.left_out.append(f"side by side: {reason_of(error)}")
    elif fitting:
        picture.variants["all"] = next(iter(picture.variants))
    if len(group) < len(runs):
        picture.heading += f": {', '.join(labels[place] for place in group)}"
    return picture


def _pairs(name: str, placement: InReport, runs: Sequence[Run], labels: Sequence[str]) -> list[Picture]:
    """One for each pair that the page compares."""
    pictures = []
    for first, second in pairs_alike(runs):
        both = f"{labels[first]} and {labels[second]}"
        picture = Picture(name, f"{placement.heading}: {both}")
        try:
            _draw(placement, {first: runs[first], second: runs[second]}, picture, "all")
        except Exception as error:
            picture.left_out.append(f"{both}: {reason_of(error)}")
        pictures.append(picture)
    return pictures


def reason_of(error: Exception) -> str:
    """Why something is not on a page: as its own message says, or that the run holds what no probe writes."""
    if isinstance(error, OspDiagError):
        return str(error)
    return f"it cannot be made of what the run holds ({type(error).__name__}: {error})"


def _draw(
    placement: InReport,
    runs: Mapping[int, Run],
    picture: Picture,
    variant: str,
    diagnoses: Mapping[int, Diagnosis] | None = None,
) -> None:
    """Of runs by their places on the page."""
    drawing, dataset = page_picture(picture.name, runs, diagnoses)
    for trace in drawing["data"]:
        if "text" in trace:
            trace["text"] = factored(trace["text"])
    drawing["caption"] = _step_of_figure(placement, list(runs.values())) + str(dataset.attrs["caption"])
    picture.variants[variant] = drawing
    picture.heading = picture.heading or str(dataset.attrs["title"])


def page_picture(
    name: str, runs: Mapping[int, Run], diagnoses: Mapping[int, Diagnosis] | None = None
) -> tuple[dict[str, Any], xr.Dataset]:
    """A figure as ``figures.draw`` does it, but for the caption, which a page sets in its own type.

    Parameters
    ----------
    runs : by their places on the page, which give them their colours
    diagnoses : by the same places, for the figures of a diagnosis; None: each is made here

    Returns
    -------
    ``data`` and ``layout`` for plotly, made small; and what was drawn, with the caption in its attrs
    """
    figure, placement = figure_module(name), in_report(name)
    limit = placement.most_steps
    short = [run if limit is None else thinned_run(run, limit) for run in runs.values()]
    options = dict(placement.options)
    if placement.diagnosis and diagnoses is not None:
        options["diagnoses"] = [diagnoses[place] for place in runs]
    dataset = figure.prepare(short, **options)
    style = load_style("paper").at_places(runs)
    canvas = figure.draw(dataset, load_backend("plotly"), style=style, width="two-column")
    drawing = canvas.finish(dataset).to_plotly_json()
    return compacted({"data": drawing["data"], "layout": drawing["layout"]}), dataset


def _step_of_figure(placement: InReport, runs: Sequence[Run]) -> str:
    """What step a figure is of that neither runs over the steps nor follows the page's slider."""
    if placement.fewest_steps > 1 or all(len(run.steps) == 1 for run in runs):
        return ""
    ordinal, place = ("first", 0) if placement.raw_activations else ("last", -1)
    steps = [f"{int(run.steps[place]):,}" for run in runs]
    step_text = f" ({steps[0]})" if len(set(steps)) == 1 else f" of each run ({', '.join(steps)})"
    return f"Of the {ordinal} probed step{step_text}, wherever the step slider stands. "
