"""When each head becomes an attention sink: the sink rate of every head over the steps of a training.

A row is a head, heads of a layer together. A dot marks the step from which on a head sinks at every later
one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.analyses.sinks.implementation import sink_emergence
from osp_diag.analyses.sinks.rules import SinkRules
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._placement import ADAM_AND_OSP, InGallery, InReport
from osp_diag.figures._runs import per_run, statistics
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("emergence_of_sinks",)
REPORT = InReport("When heads became sinks", place=70, fewest_steps=2, most_steps=12)
GALLERY = InGallery(
    ADAM_AND_OSP,
    "How heads come to attend to the first token; in models this small none becomes a sink.",
    place=170,
    options={"epsilon": 0.1},
)
MOST_TICKS = 12

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(runs: list[Run], *, epsilon: float = 0.3, sink_rate: float = 0.5) -> xr.Dataset:
    """Sink rates by head and step.

    Parameters
    ----------
    epsilon : a head sinks a sequence if the first token gets more than this share on average
    sink_rate : a head is a sink if it does so in at least this share of the sequences

    Returns
    -------
    ``sink_rate`` (run, layer, head, step), NaN where a run has no such step or head, and ``emergence_step``
    (run, layer, head), NaN for heads that are no sinks at the end.
    """
    rules = SinkRules(epsilon=epsilon, sink_rate=sink_rate)
    parts, steps, identifiers = [], [], []
    for run in runs:
        rate = statistics(run, "attention", ("sink_rate",), "sink_emergence")["sink_rate"]
        identifiers.append(str(rate.attrs.get("estimator", "sink_rate")))
        emergence = sink_emergence(run, rules=rules)
        part = emergence[["sink_rate", "emergence_step"]].transpose("layer", "head", "step")
        parts.append(part.rename(step="probed_step"))
        steps.append(step_of(run))
    dataset = per_run(parts, labels_of(runs, steps)).rename(probed_step="step").sortby("step")
    title = "Emergence of attention sinks by head"
    length = ", ".join(dict.fromkeys(str(run.attrs.get("sequence_length", "unknown")) for run in runs))
    remark = (
        f"Sink rate: share of sequences in which the first token gets more than \u03b5 = {epsilon:g} of a "
        f"head's attention; T = {length}. Dot: from here on at least {sink_rate:.0%} at every probed step"
    )
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, identifiers, [remark]),
        "quantity": f"{identifiers[0]}, \u03b5 = {epsilon:g}",
    }
    return dataset


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A map a run, one under the other; probed steps stand side by side whatever lies between them."""
    runs = dataset.sizes["run"]
    canvas = backend.canvas(runs, 1, width=style.widths[width], height=2.5 * runs, style=style)
    colours: dict[str, Any] = {"scale": ColourScale(0.0, 1.0), "colour_map": style.share_map}
    panels: list[Panel] = []
    for row in range(runs):
        part = dataset.isel(run=row).dropna("step", how="all", subset=["sink_rate"])
        rate = part["sink_rate"].dropna("layer", how="all").dropna("head", how="all")
        values = rate.transpose("layer", "head", "step").values
        layers, heads, probed = values.shape
        panel = canvas.panel(
            row,
            0,
            title=str(part["run"].item()),
            x_label="probed step" if row == runs - 1 else "",
            y_label=f"layer, {heads} heads each" if heads > 1 else "layer",
        )
        panel.heat_map(
            values.reshape(layers * heads, probed),
            np.arange(probed, dtype=float),
            np.arange(layers * heads, dtype=float),
            quantity=dataset.attrs["quantity"],
            x_texts=[str(step) for step in rate["step"].values],
            y_texts=[f"{layer}, head {head}" for layer in rate["layer"].values for head in range(heads)],
            **colours,
        )
        emergence_steps = part["emergence_step"].sel(layer=rate["layer"], head=rate["head"])
        _dots(panel, emergence_steps.transpose("layer", "head").values.ravel(), rate["step"].values, style)
        step_places = _spread(probed)
        panel.ticks(
            "x", [float(place) for place in step_places], [f"{int(rate['step'][p]):,}" for p in step_places]
        )
        layer_places = _spread(layers)
        centres = [float(place * heads + (heads - 1) / 2) for place in layer_places]
        panel.ticks("y", centres, [str(int(rate["layer"][place])) for place in layer_places])
        panels.append(panel)
    canvas.colour_bar(panels, label=dataset.attrs["quantity"], **colours)
    return canvas


def _spread(count: int) -> list[int]:
    """Evenly spaced places of ``count``, at most so many, from the first on."""
    return list(range(0, count, -(-count // MOST_TICKS)))


def _dots(panel: Panel, emergence_steps: np.ndarray, steps: np.ndarray, style: Style) -> None:
    heads = np.flatnonzero(np.isfinite(emergence_steps))
    if heads.size and len(steps) > 1:  # of one step nobody can say what came before
        places = np.searchsorted(steps, emergence_steps[heads]).astype(float)
        panel.scatter(places, heads.astype(float), label="", colour=style.palette[-1])
