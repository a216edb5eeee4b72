"""What makes the sink of one head: q·k_sink by channel and by rotary frequency.

A sink carried by few channels and one spread over many can have the same logit. The head with the strongest
sink of each run is taken unless a layer and a head are given.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.analyses.sinks.implementation import sink_implementation
from osp_diag.figures._caption import caption
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import check_label, per_run, statistics
from osp_diag.figures._sink_heads import sink_strength
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("sink_channels",)
REPORT = InReport(linked_charts=True)
GALLERY = InGallery(SMOLLM2, "Which channels and rotary frequencies make a head's sink logit.", place=180)
NAMED = 5
"""Channels and frequencies that are named at most, of those that carry 90%."""

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    layer: int | None = None,
    head: int | None = None,
    rope_theta: float | None = None,
    step: int | None = None,
) -> xr.Dataset:
    """The parts of one head's sink logit.

    Parameters
    ----------
    layer, head : the head; by default the one with the highest sink rate at ε = 0.3 (ties go to the one
        with more attention to the first token), within the layer or head given
    rope_theta : base of the rotary frequencies, where the run doesn't say it; tells the tokens per turn

    Returns
    -------
    ``channel`` (run, head_channel) and ``frequency`` (run, rotary_frequency): logits that add up to the mean
    sink logit (frequencies to the part of rotated channels); ``wavelength`` (run, rotary_frequency; NaN where
    not known), ``layer``, ``head``, ``sink_rate``, ``kind`` and ``description`` (run; the class of the
    head, alone and with what qualifies it).
    """
    parts, steps = [], []
    identifiers = []
    for run in runs:
        steps.append(step_of(run, step))
        measured = statistics(run, "attention", ("sink_logit_contribution",), "sink_implementation", step)
        identifiers += [measured["sink_logit_contribution"].attrs.get("estimator", ""), "sink_rate/1"]
        implementation = sink_implementation(run, steps=steps[-1:], rope_theta=rope_theta).isel(
            step=0, drop=True
        )
        parts.append(_of_run(implementation, run, layer, head))
    dataset = per_run(parts, labels_of(runs, steps))
    title = "The sink logit of one head by channel and rotary frequency"
    choice = "the head given" if None not in (layer, head) else "the head with the highest sink rate"
    classes = " / ".join(str(description) for description in dataset["description"].values)
    remark = f"Mean over queries of scale · q_j · k_sink,j, {choice}; frequencies add up their two channels"
    dataset.attrs = {
        "title": title,
        "caption": caption(
            title, runs, steps, [name for name in identifiers if name], [remark, f"Class: {classes}"]
        ),
        "contribution": next(name for name in identifiers if name != "sink_rate/1"),
    }
    return dataset


def _of_run(implementation: xr.Dataset, run: Run, layer: int | None, head: int | None) -> xr.Dataset:
    allowed = np.ones((implementation.sizes["layer"], implementation.sizes["head"]), bool)
    for axis, (dim, label) in enumerate((("layer", layer), ("head", head))):
        labels = implementation[dim].values
        check_label("sink_implementation", f"the run of {model_name(run.attrs)}", dim, label, labels)
        if label is not None:
            allowed &= np.expand_dims(labels == label, 1 - axis)
    strength = sink_strength(implementation["sink_rate"].values, implementation["sink_mass"].values)
    score = np.where(allowed, strength, -np.inf)
    row, column = np.unravel_index(int(np.argmax(score)), score.shape)
    at = implementation.isel(layer=int(row), head=int(column))
    kind = str(at["kind"].item())
    descriptions = dict.fromkeys([kind, str(at["channel_use"].item()), str(at["geometry"].item())])
    pairs = implementation.sizes.get("frequency", 0)
    blank = np.full(pairs, np.nan)
    return xr.Dataset(
        {
            "channel": (("head_channel",), at["sink_logit_contribution"].values),
            "frequency": (("rotary_frequency",), at["frequency_contribution"].values if pairs else blank),
            "wavelength": (
                ("rotary_frequency",),
                at["wavelength"].values if "wavelength" in at.coords else blank,
            ),
            "layer": float(at["layer"]),
            "head": float(at["head"]),
            "sink_rate": float(at["sink_rate"]),
            "kind": kind,
            "description": ", ".join(descriptions),
            "rotary_layout": str(implementation.attrs["rotary_layout"]),
        },
        coords={
            "head_channel": np.arange(implementation.sizes["head_channel"]),
            "rotary_frequency": np.arange(pairs),
        },
    )


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A row a run: by channel left, by frequency right; one under the other in a narrow figure."""
    runs, inches = dataset.sizes["run"], style.widths[width]
    stacked = inches < 5
    rows = runs * 2 if stacked else runs
    canvas = backend.canvas(rows, 1 if stacked else 2, width=inches, height=2.3 * rows, style=style)
    for row in range(runs):
        part = dataset.isel(run=row)
        values = part["frequency"].values
        left = canvas.panel(
            *((2 * row, 0) if stacked else (row, 0)),
            title=str(part["run"].item()),
            x_label=f"channel of layer {int(part['layer'])}, head {int(part['head'])}",
            y_label=f"part of the sink logit\n{dataset.attrs['contribution']}",
        )
        right = canvas.panel(
            *((2 * row + 1, 0) if stacked else (row, 1)),
            title=str(part["kind"].item()),
            x_label=_frequency_label(part["wavelength"].values),
        )
        _bars(left, part["channel"].values, style.palette[0], "channel")
        _bars(right, values, style.palette[1], "rotary frequency")
        if not np.isfinite(values).any():
            right.limits("x", 0.0, 1.0)
            right.limits("y", 0.0, 1.0)
            right.annotate(0.5, 0.5, "no rotary frequencies")
    return canvas


def _frequency_label(wavelength: np.ndarray) -> str:
    finite = wavelength[np.isfinite(wavelength)]
    if not finite.size:
        return "rotary frequency, fastest first"
    return f"rotary frequency, {finite[0]:,.0f} to {finite[-1]:,.0f} tokens per turn"


def _bars(panel: Panel, values: np.ndarray, colour: str, name: str) -> None:
    """Bars from 0, and the names of the largest that together carry 90%."""
    values = values[np.isfinite(values)]
    if not values.size:
        return
    # The outline of the bars: both edges of each, at its height.
    edges = np.repeat(np.arange(values.size + 1) - 0.5, 2)[1:-1]
    outline = np.repeat(values, 2)
    panel.line(
        edges,
        outline,
        label="",
        colour=colour,
        lower=np.minimum(outline, 0.0),
        upper=np.maximum(outline, 0.0),
        texts=[f"{name} {place}" for place in np.repeat(np.arange(values.size), 2)],
    )
    size = np.abs(values)
    order = np.argsort(-size, kind="stable")
    # The fewest bars, largest first, that together reach 90% of Σ|value|.
    needed = int((np.cumsum(size[order]) < 0.9 * size.sum()).sum()) + 1
    marked = sorted(int(place) for place in order[: min(needed, NAMED)])
    panel.marks([float(place) for place in marked], [str(place) for place in marked])
    panel.limits("x", -0.5, values.size - 0.5)
