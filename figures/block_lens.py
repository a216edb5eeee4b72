"""What a block format loses at the inputs of the projections, layer by layer.

Above, or left: the collateral loss, which a hot channel's neighbours pay. Below, or right: the effective bits
of the median token. Each beside what Gaussian noise of the same width gives.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import OspDiagError, UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._placement import SMOLLM2_LENS, InGallery, InReport
from osp_diag.figures._runs import identifier, per_run, statistics
from osp_diag.figures.backend import Backend, Canvas, Dash
from osp_diag.figures.styles import Style
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

REPORT = InReport("What block formats lose", place=135)
GALLERY = InGallery(
    SMOLLM2_LENS,
    "The input of attention loses most in most layers; its effective bits are above those of noise.",
    place=145,
)
SITES = ("attention_input", "attention_output", "mlp_input", "mlp_hidden")
"""Where activations meet weights: the inputs of the projections."""
STATISTICS = ("collateral_loss", "effective_bits")
_FLOORS = {name: f"{name}_on_noise" for name in STATISTICS}
_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dashdot", "dotted")

__all__ = ["GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run], *, block_format: str = "nvfp4", stratum: str = "all", step: int | None = None
) -> xr.Dataset:
    """Collateral loss and effective bits of one format, by layer and site.

    Parameters
    ----------
    block_format : ``nvfp4``, ``mxfp4``, ``mxfp8``, ``fp8_block``, ``int4_g128`` or ``int4_token``
    stratum : of which tokens
    step : of training; the last one by default

    Returns
    -------
    ``collateral_loss`` and ``effective_bits`` (run, site, layer), and each on Gaussian noise (run, site).
    """
    parts, steps, names = [], [], {}
    for run in runs:
        here = [_of_site(run, site, block_format, stratum, step) for site in _sites_of(run)]
        names = {name: identifier(here[0][name]) for name in STATISTICS}
        parts.append(xr.concat(here, dim="site", join="outer", coords="minimal", compat="override"))
        steps.append(step_of(run, step))
    dataset = per_run(parts, labels_of(runs, steps))
    title = f"What {block_format} loses of the inputs of projections"
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, list(names.values()), [f"Tokens: {stratum}"]),
        **names,
    }
    return dataset


def _sites_of(run: Run) -> list[str]:
    """The sites of the run that were looked at through the lens; the first of all if there is none."""
    sites = []
    for site in SITES:
        try:
            if set(STATISTICS) <= set(run.at(site).data_vars):
                sites.append(site)
        except (OspDiagError, KeyError):
            continue
    return sites or [SITES[0]]


def _of_site(run: Run, site: str, block_format: str, stratum: str, step: int | None) -> xr.Dataset:
    measured = statistics(run, site, (*STATISTICS, *_FLOORS.values()), "block_lens", step)
    for dim, label in (("block_format", block_format), ("stratum", stratum)):
        labels = [str(value) for value in measured[dim].values]
        if label not in labels:
            raise UsageError(
                f"block_lens: the run has no {dim} {label!r} at {site}; it has {', '.join(labels)}"
            )
    chosen = measured.sel(block_format=block_format, stratum=stratum, drop=True)
    # What noise gives follows from the width, which is that of every layer.
    floors = {name: chosen[name].max("layer") for name in _FLOORS.values()}
    return chosen.assign(floors).assign_coords(site=site)


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Both statistics of one run side by side; of several, a column a run."""
    runs, inches = dataset.sizes["run"], style.widths[width]
    stacked = runs > 1 or inches < 5
    rows, columns = (2, runs) if stacked else (1, 2)
    canvas = backend.canvas(rows, columns, width=inches, height=2.35 * rows, style=style, share_y=runs > 1)
    layers = dataset["layer"].values.astype(float)
    panels = []
    for index in range(runs):
        part = dataset.isel(run=index)
        for place, name in enumerate(STATISTICS):
            row, column = (place, index) if stacked else (0, place)
            panel = canvas.panel(
                row,
                column,
                title=str(part["run"].item()) if place == 0 and runs > 1 else "",
                x_label="layer" if row == rows - 1 else "",
                y_label="" if runs > 1 and column else dataset.attrs[name],
                y_scale="log" if name == "collateral_loss" else "linear",
            )
            for number, site in enumerate(part["site"].values):
                values = part[name].sel(site=site).values
                if np.isfinite(values).any():
                    panel.line(
                        layers,
                        values,
                        label=str(site),
                        colour=style.palette[number % len(style.palette)],
                        dash=_DASHES[number % len(_DASHES)],
                    )
            panel.level(float(part[_FLOORS[name]].max()), "Gaussian noise")
            panels.append(panel)
    canvas.legend(panels[0])
    return canvas
