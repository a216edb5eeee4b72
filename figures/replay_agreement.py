"""A step made again beside the recorded one, by layer and matrix: the same to the bit, or how far apart.

From a diagnosis with a replay: ``osp-diag diagnose RUN --replay 30 --out NAME.json``.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.analyses.diagnosis.replays import SAME_RULE
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._diagnoses import FEWEST_STEPS, Diagnosed, diagnoses_of, how_to_save
from osp_diag.figures._placement import ADAM_MIDWAY, InGallery, InReport
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of
from osp_diag.schema import WEIGHT_SKETCH

REPORT = InReport(
    "Whether the step, made again, is the recorded one", place=17, fewest_steps=FEWEST_STEPS, diagnosis=True
)
GALLERY = InGallery(
    ADAM_MIDWAY,
    "Under another optimizer no step has much in common with the replayed one.",
    place=163,
)
QUANTITIES = {
    "relative_difference": "‖Δ − Δreplay‖ / ‖Δ‖",
    "step_factor": "a, a factor of the step",
    "decay": "−b, a decay of the weights",
}
NO_LAYER = -1.0
"""Where parameters outside the blocks stand."""
LEAST = 1e-3
"""Relative difference down to which the colours reach at least: steps that have nothing in common have 1."""
NARROW = 5.0
"""Inches below which the maps stand one below the other."""
FARTHEST = (2.0, 5.0, 10.0, 100.0, 1000.0)
"""Ends of the colours of factors, and one over them."""

__all__ = ["GALLERY", "REPORT", "draw", "prepare"]


def prepare(runs: list[Run], *, diagnoses: Diagnosed = None) -> xr.Dataset:
    """The replayed step at which the weights first part from the record, or the last one if they never do.

    Parameters
    ----------
    diagnoses : files that ``osp-diag diagnose RUN --replay N --out NAME.json`` wrote

    Returns
    -------
    By run, ``kind`` of matrix and ``layer`` (−1: outside the blocks): ``is_same`` to the bit (1, 0, NaN where
    there is no such parameter), ``relative_difference``, and of the least squares fit Δ ≈ a · Δreplay + b · W
    ``step_factor`` a and ``decay`` −b, where its residual is below 2%; NaN elsewhere. By run,
    ``replayed_step``.

    Raises
    ------
    StoreError : the diagnosis has no replay, or no sketches of weights were recorded
    """
    made = diagnoses_of(runs, diagnoses)
    steps = [step_of(run) for run in runs]
    parts = [_of_run(run, one) for run, one in zip(runs, made, strict=True)]
    dataset = xr.concat(
        parts, dim=xr.DataArray(labels_of(runs, steps), dims="run", name="run"), join="outer"
    ).sortby("layer")
    kinds = list(dict.fromkeys(str(kind) for part in parts for kind in part["kind"].values))
    dataset = dataset.sel(kind=kinds)
    title = "A replayed step beside the recorded one, by parameter"
    remarks = [
        "= : the same to the bit; Δ ≈ a · Δreplay + b · W by least squares over the sketch's projections; "
        f"× : no such rule, the residual is above {SAME_RULE:.0%} of ‖Δ‖; – : outside the blocks",
        *(_remark(dataset.isel(run=place)) for place in range(len(runs))),
    ]
    dataset.attrs = {"title": title, "caption": caption(title, runs, steps, [], remarks)}
    return dataset


def _of_run(run: Run, diagnosis: Diagnosis) -> xr.Dataset:
    replay, name = diagnosis.replay, model_name(run.attrs)
    if replay is None:
        raise StoreError(
            f"replay_agreement: the diagnosis of {name} has no replay; {how_to_save('--replay 30')}"
        )
    table, step = replay.parameters, replay.steps["step"].values[-1]
    agree = replay.steps["weights_agree"].values
    if table is not None:
        step = replay.steps["step"].values[np.flatnonzero(agree < 1)[0]]
    elif WEIGHT_SKETCH in run.logged_groups and (agree == 1).any():
        names = run.logged(WEIGHT_SKETCH)["parameter"].values
        table = _all_same(names)
        step = replay.steps["step"].values[np.flatnonzero(agree == 1)[-1]]
    else:
        raise StoreError(
            f"replay_agreement: no sketches of the weights of {name} are recorded at the replayed steps, so "
            "it is not known which parameters agree"
        )
    return _by_place(table).assign(replayed_step=float(step))


def _all_same(names: np.ndarray) -> xr.Dataset:
    nothing = ("parameter", np.zeros(len(names)))
    same = ("parameter", np.ones(len(names), dtype=bool))
    data = dict.fromkeys(("relative_difference", "step_factor", "decay", "residual"), nothing)
    return xr.Dataset({"is_same": same, **data}, coords={"parameter": names})


def _by_place(table: xr.Dataset) -> xr.Dataset:
    """Parameters laid out by matrix and layer."""
    places = [_place(str(name)) for name in table["parameter"].values]
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    layers = sorted({layer for _, layer in places})
    same = table["is_same"].values.astype(bool)
    fits = ~same & (table["residual"].values < SAME_RULE)
    columns = {
        # Of a parameter that one of the two has not, nothing can be said.
        "is_same": np.where(np.isfinite(table["relative_difference"].values), same.astype(float), np.nan),
        "relative_difference": np.where(same, np.nan, table["relative_difference"].values),
        "step_factor": np.where(fits, table["step_factor"].values, np.nan),
        "decay": np.where(fits, table["decay"].values, np.nan),
    }
    data = {}
    for name, values in columns.items():
        grid = np.full((len(kinds), len(layers)), np.nan)
        for (kind, layer), value in zip(places, values, strict=True):
            grid[kinds.index(kind), layers.index(layer)] = value
        data[name] = (("kind", "layer"), grid)
    return xr.Dataset(data, coords={"kind": kinds, "layer": layers})


def _place(parameter: str) -> tuple[str, float]:
    """(matrix, layer) of ``model.layers.3.mlp.down_proj.weight``."""
    _, found, rest = parameter.partition("layers.")
    number, _, module = rest.partition(".")
    if not found or not number.isdigit():
        return parameter.removeprefix("model.").removesuffix(".weight"), NO_LAYER
    return module.removesuffix(".weight").rpartition(".")[2], float(number)


def _remark(part: xr.Dataset) -> str:
    same, step = part["is_same"].values, int(part["replayed_step"].item())
    count, of = int(np.nansum(same)), int(np.isfinite(same).sum())
    fits = int(np.isfinite(part["step_factor"].values).sum())
    rule = f", and the rule fits {fits} of the others" if count < of else ""
    return f"{part['run'].item()}: at step {step:,} {count} of {of} parameters are the same to the bit{rule}"


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A row a run: how far apart, and the factor and decay of the fits where there are any."""
    shown = [name for name in QUANTITIES if np.nan_to_num(dataset[name].values).any()]
    shown = shown or ["relative_difference"]
    rows, kinds = dataset.sizes["run"], dataset.sizes["kind"]
    inches, stacked = style.widths[width], style.widths[width] < NARROW
    height = rows * (0.9 + 0.17 * kinds) * (len(shown) if stacked else 1)
    grid = (rows * len(shown), 1) if stacked else (rows, len(shown))
    canvas = backend.canvas(*grid, width=inches, height=height, style=style, share_y=not stacked)
    for column, name in enumerate(shown):
        scale, colour_map = _scale(name, dataset[name].values, style)
        panels = []
        for row in range(rows):
            part = dataset.isel(run=row)
            words = f"step {int(part['replayed_step'].item()):,}"
            panel = canvas.panel(
                row * len(shown) + column if stacked else row,
                0 if stacked else column,
                title=f"{part['run'].item()}, {words}" if column == 0 else "",
                x_label="layer" if row == rows - 1 else "",
            )
            _draw_cells(part, name, panel, scale, colour_map)
            panels.append(panel)
        if np.isfinite(dataset[name].values).any():
            canvas.colour_bar(panels, scale=scale, colour_map=colour_map, label=QUANTITIES[name])
    return canvas


def _scale(name: str, values: np.ndarray, style: Style) -> tuple[ColourScale, str]:
    """Differences by their size; factors about 1 and decays about 0, in two colours."""
    finite = values[np.isfinite(values)]
    if name == "relative_difference":
        low, high = float(finite.min(initial=LEAST)), float(finite.max(initial=1.0))
        return ColourScale(max(low, 1e-9), high, "log"), style.magnitude_map
    if name == "step_factor" and finite.size and (finite > 0).all():
        far = float(np.exp(np.abs(np.log(finite)).max()))
        far = next((end for end in FARTHEST if end >= far), far)
        return ColourScale(1 / far, far, "log"), "vik"
    far = float(np.abs(finite).max(initial=0.0)) or 1.0
    return ColourScale(-far, far), "vik"


def _draw_cells(part: xr.Dataset, name: str, panel: Panel, scale: ColourScale, colour_map: str) -> None:
    kinds, layers = [str(kind) for kind in part["kind"].values], part["layer"].values
    rows = np.arange(len(kinds), dtype=float)
    words = ["outside the blocks" if layer == NO_LAYER else f"layer {layer:g}" for layer in layers]
    panel.heat_map(
        part[name].values,
        layers,
        rows,
        scale=scale,
        colour_map=colour_map,
        quantity=QUANTITIES[name],
        x_texts=words,
        y_texts=kinds,
    )
    panel.ticks("y", list(rows), kinds)
    thinned = layers[layers >= 0][:: max(1, -(-len(layers) // 12))]
    none = [layer for layer in layers if layer == NO_LAYER]
    panel.ticks("x", [*none, *thinned], ["–"] * len(none) + [f"{layer:g}" for layer in thinned])
    same, values = part["is_same"].values, part[name].values
    for row, column in np.argwhere(np.isfinite(same) & np.isnan(values)):
        panel.annotate(layers[column], rows[row], "=" if same[row, column] else "×", centred=True)
