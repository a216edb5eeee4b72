"""Which heads are attention sinks: the sink rate and the attention to the first token, layer × head."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import identifier, per_run, statistics
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("sinks",)
REPORT = InReport(linked_charts=True)
GALLERY = InGallery(SMOLLM2, "Which heads attend to the first token.", place=160)

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    epsilon: float = 0.3,
    sink_position: int = 0,
    stratum: str = "all",
    step: int | None = None,
) -> xr.Dataset:
    """Sink rate and first-token attention of every head.

    Parameters
    ----------
    epsilon : a head sinks a sequence if the sink position gets more than this share on average
    sink_position : the key position k of the sink; 0 is the first token
    stratum : the queries that ``first_token_attention`` speaks of

    Returns
    -------
    ``sink_rate`` and ``first_token_attention`` (run, layer, head), NaN where there is no head.
    """
    parts, steps, identifiers = [], [], []
    for run in runs:
        attention = statistics(run, "attention", ("sink_rate", "first_token_attention"), "sink_map", step)
        rate = _rate_at(attention["sink_rate"], run, epsilon, sink_position)
        mass = attention["first_token_attention"].sel(stratum=stratum, drop=True)
        parts.append(xr.Dataset({"sink_rate": rate, "first_token_attention": mass}))
        identifiers += [identifier(attention[name]) for name in attention]
        steps.append(step_of(run, step))
    dataset = per_run(parts, labels_of(runs, steps))
    title = "Attention sinks by layer and head"
    lengths = ", ".join(dict.fromkeys(str(run.attrs.get("sequence_length", "unknown")) for run in runs))
    starts = ", ".join(dict.fromkeys(str(run.attrs.get("bos", "unknown")) for run in runs))
    remark = (
        f"Sink rate: share of sequences in which position {sink_position} gets more than \u03b5 = "
        f"{epsilon:g} of a head's attention; T = {lengths}, BOS {starts}; it falls with T"
    )
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, identifiers, [remark]),
        "epsilon": epsilon,
        "sink_position": sink_position,
        "sink_rate": next(name for name in identifiers if name.startswith("sink_rate")),
        "first_token_attention": next(name for name in identifiers if name.startswith("first_token")),
    }
    return dataset


def _rate_at(rate: xr.DataArray, run: Run, epsilon: float, position: int) -> xr.DataArray:
    """The rate at the ε and k asked for; the run holds a few of each."""
    for dim, label in (("epsilon", epsilon), ("sink_position", position)):
        if dim not in rate.dims:
            continue
        labels = rate[dim].values
        index = int(np.argmin(np.abs(labels - label)))
        if abs(float(labels[index]) - label) > 1e-9:
            raise UsageError(
                f"sink_map: the run of {model_name(run.attrs)} has no {dim} {label:g}; it has "
                f"{', '.join(f'{float(value):g}' for value in labels)}"
            )
        rate = rate.isel({dim: index}, drop=True)
    return rate


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Two maps a run: sink rate, first-token attention."""
    runs = dataset.sizes["run"]
    layers_shown = dataset.sizes["layer"]
    inches = style.widths[width]
    height = min(max(1.9, 0.06 * layers_shown + 1.0), 4.0) * runs
    canvas = backend.canvas(runs, 2, width=inches, height=height, style=style)
    colours: dict[str, Any] = {"scale": ColourScale(0.0, 1.0), "colour_map": style.share_map}
    subtitles = {
        "sink_rate": "{sink_rate}, \u03b5 = {epsilon:g}, k = {sink_position}".format(**dataset.attrs),
        "first_token_attention": dataset.attrs["first_token_attention"],
    }
    panels = []
    for row in range(runs):
        part = dataset.isel(run=row)
        for column, (name, subtitle) in enumerate(subtitles.items()):
            values = part[name].transpose("layer", "head")
            values = values.dropna("layer", how="all").dropna("head", how="all")
            panel = canvas.panel(
                row,
                column,
                title=str(part["run"].item()) if column == 0 else "",
                subtitle=subtitle,
                x_label="head" if row == runs - 1 else "",
                y_label="" if column else "layer",
            )
            panel.heat_map(
                values.values,
                values["head"].values.astype(float),
                values["layer"].values.astype(float),
                quantity=dataset.attrs[name],
                **colours,
            )
            panels.append(panel)
    canvas.colour_bar(panels, label="share", **colours)
    return canvas
