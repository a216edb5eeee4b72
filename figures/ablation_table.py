"""The ablation as a table: kurtosis, and perplexity at falling bits, a row a recipe (OSP paper, Table 2).

Each column is tinted from its best value (light) to its worst (dark), on a logarithmic scale.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.few_bits import perplexity_at
from osp_diag.analyses.recipes import PAPER_ORDER
from osp_diag.analyses.run_labels import labels_of
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._few_bits import results_and_remark
from osp_diag.figures._hidden_states import KURTOSIS, kurtosis_by_step
from osp_diag.figures._placement import SIX_RECIPES, InGallery
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.quantizing.results import PLAIN_CONVENTION, ROUND_TO_NEAREST, UNQUANTIZED, notation
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of
from osp_diag.wording import number

ALIASES = ("table2",)
GALLERY = InGallery(
    SIX_RECIPES, "Kurtosis and perplexity of every recipe, as Table 2 of the paper.", place=80
)
SETTINGS = (
    (UNQUANTIZED, UNQUANTIZED, UNQUANTIZED),
    (8, 8, UNQUANTIZED),
    (4, UNQUANTIZED, UNQUANTIZED),
    (4, 8, UNQUANTIZED),
    (4, 8, 8),
    (4, 4, UNQUANTIZED),
    (4, 4, 4),
)
"""Columns of perplexity, where any run holds them."""
LIGHTEST = 3.0
"""A column fills the lightest third of the colour map, on which dark text can be read."""

__all__ = ["ALIASES", "GALLERY", "draw", "prepare"]


def prepare(
    runs: list[Run], *, method: str = ROUND_TO_NEAREST, convention: str = PLAIN_CONVENTION
) -> xr.Dataset:
    """The numbers of the table.

    Parameters
    ----------
    method, convention : how weights and activations were rounded, as `osp-diag quantize` calls it

    Returns
    -------
    ``value`` (run, column), rows in the order of the paper, NaN where a run lacks a number. Columns are the
    mean OSP kurtosis of the hidden states at the run's last probe and the perplexity of each setting.
    """
    results, remark = results_and_remark(runs, method, convention)
    steps = [step_of(run) for run in runs]
    settings = [
        bits for bits in SETTINGS if any(np.isfinite(perplexity_at(table, *bits)) for table in results)
    ]
    rows = [
        [
            float(kurtosis_by_step(run, "ablation_table")[1][-1]),
            *(perplexity_at(table, *bits) for bits in settings),
        ]
        for run, table in zip(runs, results, strict=True)
    ]
    columns = ["OSP kurtosis", *(f"perplexity {notation(*bits)}" for bits in settings)]
    labels = labels_of(runs, steps)
    dataset = xr.Dataset(
        {"value": (("run", "column"), np.array(rows))}, coords={"run": labels, "column": columns}
    ).dropna("column", how="all")
    rank = {name: place for place, name in enumerate(PAPER_ORDER)}
    order = sorted(range(len(labels)), key=lambda row: rank.get(labels[row].partition(",")[0], len(rank)))
    dataset = dataset.isel(run=order)
    title = "Kurtosis, and perplexity at falling bits"
    dataset.attrs = {
        "title": title,
        "caption": caption(
            title,
            [runs[row] for row in order],
            [steps[row] for row in order],
            [KURTOSIS, "perplexity"],
            [remark, "Light is the best of a column, dark the worst"],
        ),
    }
    return dataset


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """One panel: tinted cells with their numbers, and the names of the columns above them."""
    values = dataset["value"].values
    rows, columns = values.shape
    inches = style.widths[width]
    narrow = inches / (columns + 2) < 0.7
    canvas = backend.canvas(1, 1, width=inches, height=0.27 * rows + 0.75, style=style)
    panel = canvas.panel(0, 0)
    x, y = np.arange(columns, dtype=float), np.arange(rows + 1, dtype=float)
    shades = np.vstack([_shades(values)[::-1], np.full(columns, np.nan)])
    panel.heat_map(
        shades,
        x,
        y,
        scale=ColourScale(0.0, LIGHTEST),
        colour_map=style.share_map,
        quantity="from the best of the column to the worst",
        x_texts=[str(name) for name in dataset["column"].values],
        y_texts=[*(str(name) for name in dataset["run"].values[::-1]), ""],
    )
    for column, name in enumerate(dataset["column"].values):
        heading = str(name).replace("perplexity ", "").replace("A", "\nA") if narrow else str(name)
        panel.annotate(float(column), float(rows), heading.replace(" ", "\n", 1), centred=True)
        for row in range(rows):
            value = values[row, column]
            text = "\u2013" if np.isnan(value) else number(float(value))
            panel.annotate(float(column), float(rows - 1 - row), text, centred=True)
    panel.ticks("x", [], [])
    panel.ticks("y", y[:-1].tolist(), [str(name) for name in dataset["run"].values[::-1]])
    return canvas


def _shades(values: np.ndarray) -> np.ndarray:
    """0 for the least of a column, 1 for the largest, evenly by their logarithms; 0 where all are equal."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(values > 0, np.log(values), np.nan)
    logs = np.where(np.isposinf(logs), np.nan, logs)
    finite = np.isfinite(logs)
    low = np.min(logs, axis=0, where=finite, initial=np.inf)
    high = np.max(logs, axis=0, where=finite, initial=-np.inf)
    span = np.where(high > low, high - low, 1.0)
    # (log v − log least) / (log largest − log least)
    shades = np.where(finite, (logs - low) / span, np.nan)
    # The logarithm of 0 is below every other, that of infinity above.
    shades = np.where(values == 0, 0.0, shades)
    return np.where(np.isposinf(values), 1.0, shades)
