"""Perplexity against bits: Figure 4 of the OSP paper.

Left, or above: weights from 16 bits down, activations as they are. Right, or below: activations from 16 bits
down, weights as they are. One line a run, on the same tokens.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.few_bits import perplexity_at
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError
from osp_diag.figures._caption import caption
from osp_diag.figures._few_bits import results_by_methods
from osp_diag.figures._placement import SIX_RECIPES, InGallery, InReport
from osp_diag.figures.backend import Backend, Canvas, Dash
from osp_diag.figures.styles import Style
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.results import PLAIN_CONVENTION, ROUND_TO_NEAREST, UNQUANTIZED
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("fig4",)
REPORT = InReport("What quantization costs", place=130)
GALLERY = InGallery(
    SIX_RECIPES,
    "What each bit taken from weights, or from activations, costs; without the option, the perplexity.",
    place=40,
    options={"relative": True},
)
SWEEPS = {"weights": "weight_bits", "activations": "activation_bits"}
_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dashdot")
_WIDE_RANGE = 10.0
"""A perplexity that grows by more than this factor is drawn on a logarithmic axis."""

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    relative: bool = False,
    method: str = ROUND_TO_NEAREST,
    convention: str = PLAIN_CONVENTION,
) -> xr.Dataset:
    """Perplexity by bits of weights, and of activations.

    Parameters
    ----------
    relative : divide by the run's own perplexity at 16 bits
    method, convention : how weights and activations were rounded, as `osp-diag quantize` calls it; several
        methods with commas between them, as in ``rtn,gptq``, have a line each

    Returns
    -------
    ``perplexity`` (run, sweep, bits), or its quotient: ``weights`` with activations at 16 bits, and the other
    way round; from 16 bits down, NaN where it was not measured.
    """
    methods = list(dict.fromkeys(name.strip() for name in method.split(",")))
    results, remark = results_by_methods(runs, methods, convention)
    steps = [step_of(run) for run in runs]
    bits = sorted({int(b) for table in results for name in SWEEPS.values() for b in table[name].values})[::-1]
    values = np.array(
        [
            [
                [perplexity_at(table, b, UNQUANTIZED) for b in bits],
                [perplexity_at(table, UNQUANTIZED, b) for b in bits],
            ]
            for table in results
        ]
    )
    if (np.isfinite(values).sum(-1) < 2).all():
        raise StoreError(
            "bit_width_sweep: the runs hold no sweep of weights or activations alone; measure with `osp-diag "
            "quantize CHECKPOINT --run RUN`, without --bits"
        )
    if relative:
        values = values / values[:, :1, :1]  # bits fall, so that the first are 16
    dataset = xr.Dataset(
        {"perplexity": (("run", "sweep", "bits"), values)},
        coords={"run": _labels(runs, steps, methods), "sweep": list(SWEEPS), "bits": bits},
    )
    label = "perplexity / that at 16 bits" if relative else "perplexity"
    title = f"{label.capitalize()}, by bits of weights and of activations"
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, ["perplexity"], [remark]),
        "label": label,
    }
    return dataset


def _labels(runs: list[Run], steps: list[int], methods: list[str]) -> list[str]:
    """Of several methods the run's name, where there are several, and the method's."""
    labels = labels_of(runs, steps)
    if len(methods) == 1:
        return labels
    titles = [method_named(name).title for name in methods]
    return titles if len(runs) == 1 else [f"{label}, {title}" for label in labels for title in titles]


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A panel a sweep; bits fall from left to right, evenly spaced."""
    inches = style.widths[width]
    stacked = inches < 5
    rows, columns = (2, 1) if stacked else (1, 2)
    canvas = backend.canvas(rows, columns, width=inches, height=2.35 * rows, style=style, share_y=not stacked)
    finite = dataset["perplexity"].values[np.isfinite(dataset["perplexity"].values)]
    wide = bool(finite.size) and finite.max() > _WIDE_RANGE * finite.min()
    colours = style.colours_of_runs(dataset.sizes["run"])
    panels = []
    for index, sweep in enumerate(dataset["sweep"].values):
        other = "activations" if sweep == "weights" else "weights"
        panel = canvas.panel(
            *((index, 0) if stacked else (0, index)),
            x_label=f"bits of {sweep} ({other} as they are)",
            y_label=dataset.attrs["label"] if stacked or index == 0 else "",
            y_scale="log" if wide else "linear",
        )
        part = dataset["perplexity"].sel(sweep=sweep)
        measured = part.dropna("bits", how="all")
        places = np.arange(measured.sizes["bits"], dtype=float)
        for place, run in enumerate(measured["run"].values):
            values = measured.sel(run=run).values
            values = np.where(np.isfinite(values), values, np.nan)
            colour = colours[place]
            panel.line(places, values, label=str(run), colour=colour, dash=_DASHES[place % len(_DASHES)])
            panel.scatter(places, values, label="", colour=colour)
        panel.ticks("x", places.tolist(), [str(int(b)) for b in measured["bits"].values])
        panels.append(panel)
    canvas.legend(panels[0])
    return canvas
