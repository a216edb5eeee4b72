"""What jumped first along the network: each site and layer in the order of the data, by the size of its jump.

The monitor's own units: a change between two probes over the largest such change before.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import sample
from osp_diag.figures._diagnoses import FEWEST_STEPS, Diagnosed, diagnoses_of
from osp_diag.figures._placement import ADAM_MIDWAY, InGallery, InReport
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

REPORT = InReport("What jumped first along the network", place=16, fewest_steps=FEWEST_STEPS, diagnosis=True)
GALLERY = InGallery(
    ADAM_MIDWAY, "The sites that jumped at once, and the first of them on the way.", place=162
)
SMALLEST = 0.1
"""Smaller changes are drawn at this size."""
MOST_STEPS = 5
"""Colours for so many steps; all later jumps have the last one."""
FIRST = "#c80c1f"

__all__ = ["GALLERY", "REPORT", "draw", "prepare"]


def prepare(runs: list[Run], *, diagnoses: Diagnosed = None) -> xr.Dataset:
    """Jumps by place of the network.

    Parameters
    ----------
    diagnoses : files that ``osp-diag diagnose RUN --out NAME.json`` wrote; by default each run is judged here

    Returns
    -------
    ``size`` (run, place) and ``step`` (run, place) of the first jump of any number there; where ``step`` is
    NaN nothing jumped, and the size is of the largest change. ``statistic``, ``site`` and ``layer`` (run,
    place) say of what; "" and NaN beyond a run's last place. ``threshold`` (run).

    Raises
    ------
    StoreError : too few probes to say what is usual
    """
    tables = [made.jumps for made in diagnoses_of(runs, diagnoses)]
    for run, table in zip(runs, tables, strict=True):
        if table is None:
            raise StoreError(
                f"first_jumps: the run of {model_name(run.attrs)} has too few probes to say which changes "
                "are usual; about six are needed (probe.every)"
            )
    present = [table for table in tables if table is not None]
    steps = [step_of(run) for run in runs]
    width = max(table.sizes["place"] for table in present)
    parts = [
        table.reset_coords(["site", "layer"])
        .assign_coords(place=range(table.sizes["place"]))
        .reindex(place=range(width), fill_value={"site": "", "statistic": ""})
        for table in present
    ]
    dataset = xr.concat(parts, dim=xr.DataArray(labels_of(runs, steps), dims="run", name="run"))
    dataset["threshold"] = ("run", [float(table["size"].attrs["threshold"]) for table in present])
    title = "What jumped first along the network"
    remarks = [
        "A size is |Δ ln| between two probes over the largest such change of that statistic and site before, "
        f"of the first jump of a place or else of its largest change; below {SMALLEST} drawn there",
        *(_remark(dataset.isel(run=place)) for place in range(len(runs))),
    ]
    dataset.attrs = {"title": title, "caption": caption(title, runs, steps, [], remarks)}
    return dataset


def _remark(part: xr.Dataset) -> str:
    label, steps = str(part["run"].item()), part["step"].values
    if not np.isfinite(steps).any():
        return f"{label}: nothing jumped"
    first = int(np.flatnonzero(steps == np.nanmin(steps))[0])
    there = int((steps == steps[first]).sum())
    return (
        f"{label}: first at step {int(steps[first]):,} {part['statistic'].values[first]} of "
        f"{_place(part, first)}, with {there - 1} places after it; later {int((steps > steps[first]).sum())}"
    )


def _place(part: xr.Dataset, index: int) -> str:
    site, layer = str(part["site"].values[index]), part["layer"].values[index]
    return site if site in ("embedding", "final_norm") else f"{site}, layer {int(layer)}"


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A row a run: grey points did not jump, colours are steps, and the first place is named."""
    rows = dataset.sizes["run"]
    canvas = backend.canvas(rows, 1, width=style.widths[width], height=0.4 + 2.1 * rows, style=style)
    for row in range(rows):
        part = dataset.isel(run=row)
        panel = canvas.panel(
            row,
            0,
            title=str(part["run"].item()) if rows > 1 else "",
            x_label="sites in network order, by layer" if row == rows - 1 else "",
            y_label="change between probes\n(× the usual largest)",
            y_scale="log",
        )
        _draw_places(part, panel, style)
        panel.legend()
    return canvas


def _draw_places(part: xr.Dataset, panel: Panel, style: Style) -> None:
    sizes, steps = np.maximum(part["size"].values, SMALLEST), part["step"].values
    present = np.isfinite(part["size"].values)
    texts = np.array(
        [
            f"{_place(part, int(place))}: {part['statistic'].values[place]}"
            for place in np.flatnonzero(present)
        ]
    )
    x = np.arange(len(sizes), dtype=float)[present]
    sizes, steps = sizes[present], steps[present]
    panel.level(part["threshold"].item(), "a jump")
    quiet = np.isnan(steps)
    panel.scatter(x[quiet], sizes[quiet], label="no jump", colour="#9a9a9a", texts=list(texts[quiet]))
    jumps = np.unique(steps[~quiet])
    shown = jumps[:MOST_STEPS]
    for step, colour in zip(shown, sample("batlow", max(2, len(shown)), 0.15, 0.75), strict=False):
        later = len(jumps) > MOST_STEPS and step == shown[-1]
        here = steps >= step if later else steps == step
        label = f"first jump at step {int(step):,}{' and later' if later else ''}"
        panel.scatter(x[here], sizes[here], label=label, colour=colour, texts=list(texts[here]))
    panel.limits("y", 0.7 * float(sizes.min()), 1.6 * max(float(sizes.max()), part["threshold"].item()))
    panel.limits("x", -1.0, float(len(x)))
    _name_layers(part.isel(place=present), panel)
    if jumps.size:
        first = int(np.flatnonzero(steps == jumps[0])[0])
        panel.scatter(
            x[[first]], sizes[[first]], label=f"first: {texts[first]}", colour=FIRST, texts=[texts[first]]
        )


def _name_layers(part: xr.Dataset, panel: Panel) -> None:
    """The number of each layer under the middle of its sites; embedding and final norm by their names."""
    names = [
        str(site) if site in ("embedding", "final_norm") else f"{int(layer)}"
        for site, layer in zip(part["site"].values, part["layer"].values, strict=True)
    ]
    places = {name: [index for index, other in enumerate(names) if other == name] for name in names}
    words = {"embedding": "emb.", "final_norm": "norm"}
    thinned = max(1, -(-len(places) // 16))
    chosen = [name for index, name in enumerate(places) if name in words or index % thinned == 0]
    panel.ticks(
        "x", [float(np.mean(places[name])) for name in chosen], [words.get(name, name) for name in chosen]
    )
