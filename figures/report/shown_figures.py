"""Which figures a report shows, in which order; a new one joins in a line, or at the end by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import xarray as xr

from osp_diag.analyses.thinned_run import thinned_run
from osp_diag.errors import OspDiagError
from osp_diag.figures._registry import figure_module, names
from osp_diag.figures.backend import load_backend
from osp_diag.figures.report.comparison import alike, pairs_alike
from osp_diag.figures.report.encoding import compacted, factored
from osp_diag.figures.styles import Style, load_style

__all__ = ["ELSEWHERE", "FIGURES", "Drawn", "Shown", "draw_figures", "page_picture"]


@dataclass(frozen=True)
class Shown:
    """A figure on the page."""

    name: str
    """in the registry of figures"""
    heading: str = ""
    """the question that it answers; the figure's own title if empty"""
    steps: int = 1
    """the fewest probed steps that make sense of it"""
    most: int | None = None
    """Longer runs are thinned evenly to so many steps, where the figure takes its time for each."""
    pairs: bool = False
    """drawn of two runs, and so of every pair"""
    kept: bool = False
    """drawn of raw activations, which a run keeps once, of its first probed step"""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


FIGURES = (
    Shown("kurtosis_dynamics", "How loss and kurtosis went in training", steps=2),
    Shown("outlier_timeline", "When outliers appeared, layer by layer", steps=2, options={"draws": 20}),
    Shown("activation_surface", "What the activations of the hottest layer look like", kept=True),
    Shown("depth_profile", "Where magnitudes grow"),
    Shown("concentration_curves", "How few channels hold the energy"),
    Shown("channel_map_comparison", "How the channels of two models differ", pairs=True),
    Shown("sink_emergence", "When heads became sinks", steps=2, most=12),
    Shown("attention_map", "Where the strongest sink looks", kept=True),
    Shown("qk_magnitude", "Queries and keys of the strongest sink", kept=True),
    Shown("logit_densities", "Attention logits of the sink key and of others"),
    Shown("estimator_disagreement", "What other definitions of kurtosis say"),
    Shown("weight_surface", "The weights that write the outliers"),
    Shown("bit_width_sweep", "What quantization costs"),
)
ELSEWHERE = ("channel_map", "sink_map", "sink_implementation", "stratum_comparison")
"""What the linked charts show already."""


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
    """Every figure of the table, then those of the registry that it does not name.

    What cannot be drawn has no variants, and says why in ``left_out``.
    """
    there = names()
    known = [shown for shown in FIGURES if shown.name in there]
    named = {shown.name for shown in known}
    others = [Shown(name) for name in there if name not in named and name not in ELSEWHERE]
    drawn = []
    for shown in (*known, *others):
        if shown.pairs:
            drawn += _pairs(shown, runs, labels)
        else:
            drawn += [_together(shown, runs, labels, group) for group in _groups(runs)]
    return drawn


def _groups(runs: Sequence[Any]) -> list[list[int]]:
    """Places of runs that are drawn side by side: models alike; each of the others by itself."""
    groups = alike(runs)
    rest = [[place] for place in range(len(runs)) if not any(place in group for group in groups)]
    return sorted([*groups, *rest])


def _together(shown: Shown, runs: Sequence[Any], labels: Sequence[str], group: Sequence[int]) -> Drawn:
    found = Drawn(shown.name, shown.heading)
    fitting = []
    for index in group:
        run = runs[index]
        try:
            if len(run.steps) < shown.steps:
                found.left_out.append(
                    f"{labels[index]}: it needs {shown.steps} probed steps, and there is one"
                )
                continue
            _draw(shown, [run], found, str(index))
            fitting.append(run)
        except OspDiagError as reason:
            found.left_out.append(f"{labels[index]}: {reason}")
    if len(fitting) > 1:
        try:
            _draw(shown, fitting, found, "all")
        except OspDiagError as reason:
            found.left_out.append(f"side by side: {reason}")
    elif fitting:
        found.variants["all"] = next(iter(found.variants))
    if len(group) < len(runs):
        found.heading += f": {', '.join(labels[place] for place in group)}"
    return found


def _pairs(shown: Shown, runs: Sequence[Any], labels: Sequence[str]) -> list[Drawn]:
    """One for each pair that the page compares."""
    drawn = []
    for first, second in pairs_alike(runs):
        both = f"{labels[first]} and {labels[second]}"
        found = Drawn(shown.name, f"{shown.heading}: {both}")
        try:
            _draw(shown, [runs[first], runs[second]], found, "all")
        except OspDiagError as reason:
            found.left_out.append(f"{both}: {reason}")
        drawn.append(found)
    return drawn


def _draw(shown: Shown, runs: list[Any], found: Drawn, variant: str) -> None:
    style = load_style("paper")
    if variant != "all":  # a run keeps its colour
        place = int(variant) % len(style.run_colours)
        style = replace(style, run_colours=(*style.run_colours[place:], *style.run_colours[:place]))
    found.variants[variant], dataset = page_picture(shown, runs, style)
    for trace in found.variants[variant]["data"]:
        if "text" in trace:
            trace["text"] = factored(trace["text"])
    found.variants[variant]["caption"] = _step_shown(shown, runs) + str(dataset.attrs["caption"])
    found.heading = found.heading or str(dataset.attrs["title"])


def page_picture(shown: Shown, runs: Sequence[Any], style: Style) -> tuple[dict[str, Any], xr.Dataset]:
    """As ``figures.draw`` does it, but for the caption, which a page sets in its own type.

    Returns
    -------
    ``data`` and ``layout`` for plotly, made small; and what was drawn, with the caption in its attrs
    """
    figure = figure_module(shown.name)
    if shown.most is not None:
        runs = [thinned_run(run, shown.most) for run in runs]
    dataset = figure.prepare(list(runs), **shown.options)
    canvas = figure.draw(dataset, load_backend("plotly"), style=style, width="two-column")
    picture = canvas.finish(dataset).to_plotly_json()
    return compacted({"data": picture["data"], "layout": picture["layout"]}), dataset


def _step_shown(shown: Shown, runs: Sequence[Any]) -> str:
    """What step a figure is of that neither runs over the steps nor follows the page's slider."""
    if shown.steps > 1 or all(len(run.steps) == 1 for run in runs):
        return ""
    which, place = ("first", 0) if shown.kept else ("last", -1)
    steps = [f"{int(run.steps[place]):,}" for run in runs]
    said = f" ({steps[0]})" if len(set(steps)) == 1 else f" of each run ({', '.join(steps)})"
    return f"Of the {which} probed step{said}, wherever the step slider stands. "
