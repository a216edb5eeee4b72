"""How loss and kurtosis go while a model trains (OSP paper, Fig. 3 and 7).

Left, or above: the training loss, smoothed, over the raw one in a lighter tint. Right, or below: the mean
OSP kurtosis of the hidden states on a logarithmic axis, with what Gaussian noise of that width scores (the
floor). Any number of runs, each with its own steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError, UsageError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import tint
from osp_diag.figures._hidden_states import KURTOSIS, kurtosis_by_step
from osp_diag.figures._placement import SIX_RECIPES, InGallery, InReport
from osp_diag.figures.backend import Backend, Canvas, Dash, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of
from osp_diag.wording import number

ALIASES = ("fig3", "fig7")
REPORT = InReport("How loss and kurtosis went in training", place=10, fewest_steps=2)
GALLERY = InGallery(
    SIX_RECIPES, "Adam's kurtosis climbs as the loss falls, OSP's stays at the noise.", place=30
)
AXES = ("tokens", "steps")
_DASHES: tuple[Dash, ...] = ("solid", "dashed", "dashdot")
_UNITS = ((1e12, " (trillions)"), (1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"))

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run], *, against: str | None = None, stratum: str = "all", smoothing: float = 0.02
) -> xr.Dataset:
    """Loss and kurtosis by step.

    Parameters
    ----------
    against : ``tokens`` seen or ``steps``; None: tokens where every run says how many a step takes
    stratum : of which tokens the kurtosis is: all, first, delimiter or rest
    smoothing : share of a run's records that a smoothed loss is the mean of (a window around it); 0: none

    Returns
    -------
    ``loss`` and ``smoothed_loss`` (run, record) at ``loss_step``; ``kurtosis`` (run, probe) at
    ``kurtosis_step``; ``tokens_per_step`` and ``floor`` (run). Shorter runs end in NaN.
    """
    if against is not None and against not in AXES:
        raise UsageError(f"kurtosis_dynamics: against is {' or '.join(AXES)}, not {against!r}")
    if not 0 <= smoothing < 1:
        raise UsageError(f"kurtosis_dynamics: smoothing is a share from 0 to below 1, not {smoothing}")
    steps = [step_of(run) for run in runs]
    losses = [_loss(run) for run in runs]
    kurtoses = [kurtosis_by_step(run, "kurtosis_dynamics", stratum) for run in runs]
    per_step = np.array([_tokens_per_step(run) for run in runs])
    if against is None:
        against = "tokens" if np.isfinite(per_step).all() else "steps"
    lacking = [model_name(run.attrs) for run, count in zip(runs, per_step, strict=True) if np.isnan(count)]
    if against == "tokens" and lacking:
        raise StoreError(
            f"kurtosis_dynamics: the run of {', '.join(lacking)} does not say how many tokens a step takes; "
            "draw against=steps"
        )
    smooth = [_smoothed(loss, smoothing) for _, loss in losses]
    dataset = xr.Dataset(
        {
            "loss": (("run", "record"), _padded([loss for _, loss in losses])),
            "smoothed_loss": (("run", "record"), _padded(smooth)),
            "kurtosis": (("run", "probe"), _padded([kurtosis for _, kurtosis in kurtoses])),
            "floor": ("run", [gaussian_floor(int(run.attrs["hidden_size"])) for run in runs]),
            "tokens_per_step": ("run", per_step),
        },
        coords={
            "run": labels_of(runs, steps),
            "loss_step": (("run", "record"), _padded([step for step, _ in losses])),
            "kurtosis_step": (("run", "probe"), _padded([step for step, _ in kurtoses])),
        },
    )
    title = "Training loss and OSP kurtosis of the hidden states"
    remarks = [f"Tokens of the kurtosis: {stratum}"] if stratum != "all" else []
    if smoothing:
        remarks.append(f"Loss: mean over {smoothing:.0%} of the records, raw in a lighter tint")
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, [KURTOSIS], remarks),
        "against": against,
        "smoothing": smoothing,
    }
    return dataset


def _loss(run: Run) -> tuple[np.ndarray, np.ndarray]:
    series = run.series
    if "loss" not in series:
        raise StoreError(
            f"kurtosis_dynamics needs the series `loss`, which the run of {model_name(run.attrs)} does not "
            "hold; draw a run that a training wrote"
        )
    return series["step"].values.astype(float), series["loss"].values.astype(float)


def _tokens_per_step(run: Run) -> float:
    """NaN where the loop that wrote the run does not say."""
    return float(run.attrs.get("tokens_per_step") or "nan")


def _smoothed(loss: Float[np.ndarray, " record"], share: float) -> Float[np.ndarray, " record"]:
    """Mean over a window around each record, smaller at the ends; NaN stays, and counts for nobody else."""
    reach = round(share * len(loss)) // 2
    finite = np.isfinite(loss)
    # With running sums S and n, the mean over [i − reach, i + reach] is a difference of S over one of n.
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, loss, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(loss))
    first, last = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(loss))
    mean = (total[last] - total[first]) / np.maximum(count[last] - count[first], 1)
    return np.where(finite, mean, np.nan)


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of several lengths as one array. NaN comes after a run's own values, so that no line breaks."""
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows])


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Two panels, and one legend for both."""
    inches = style.widths[width]
    stacked = inches < 5
    rows, columns = (2, 1) if stacked else (1, 2)
    canvas = backend.canvas(rows, columns, width=inches, height=2.35 * rows, style=style)
    unit, suffix = _unit(dataset)
    x_label = f"tokens seen{suffix}" if dataset.attrs["against"] == "tokens" else f"step{suffix}"
    loss = canvas.panel(0, 0, x_label="" if stacked else x_label, y_label="training loss (nats)")
    kurtosis = canvas.panel(
        *((1, 0) if stacked else (0, 1)),
        subtitle=f"dotted: Gaussian noise, {' / '.join(map(number, _floors(dataset)))}",
        x_label=x_label,
        y_label="OSP kurtosis\nosp_excess_kurtosis/1",
        y_scale="log",
    )
    colours = style.colours_of_runs(dataset.sizes["run"])
    if dataset.attrs["smoothing"]:
        for index, colour in enumerate(colours):
            part = dataset.isel(run=index)
            x = part["loss_step"].values * _factor(part, unit)
            loss.line(x, part["loss"].values, label="", colour=tint(colour, 0.72))
    for index, colour in enumerate(colours):
        part = dataset.isel(run=index)
        dash = _DASHES[index % len(_DASHES)]
        x = part["loss_step"].values * _factor(part, unit)
        loss.line(x, part["smoothed_loss"].values, label=str(part["run"].item()), colour=colour, dash=dash)
    _draw_kurtosis(dataset, kurtosis, colours, unit)
    canvas.legend(loss)
    return canvas


def _draw_kurtosis(dataset: xr.Dataset, panel: Panel, colours: Sequence[str], unit: float) -> None:
    """One line a run over the floor. The formula can be 0, which is drawn at the foot."""
    values, floors = dataset["kurtosis"].values, dataset["floor"].values
    foot = float(floors.min()) / 3 if floors.min() > 0 else 1e-3
    top = float(np.max(values, where=np.isfinite(values), initial=floors.max()))
    for index, colour in enumerate(colours):
        part = dataset.isel(run=index)
        panel.line(
            part["kurtosis_step"].values * _factor(part, unit),
            np.maximum(part["kurtosis"].values, foot),
            label=str(part["run"].item()),
            colour=colour,
            dash=_DASHES[index % len(_DASHES)],
        )
    for floor in _floors(dataset):
        panel.level(floor, "")  # a text on it would lie under the runs that stay at the floor
    panel.limits("y", foot, top * 2)


def _floors(dataset: xr.Dataset) -> list[float]:
    """One for each width that the runs have."""
    return sorted({float(value) for value in dataset["floor"].values if value > 0})


def _factor(part: xr.Dataset, unit: float) -> float:
    """What makes a step a number of the x axis."""
    tokens = part.attrs["against"] == "tokens"
    return (part["tokens_per_step"].item() if tokens else 1.0) / unit


def _unit(dataset: xr.Dataset) -> tuple[float, str]:
    """The power of a thousand in which the x axis is short to read, and how it is called."""
    parts = [dataset.isel(run=index) for index in range(dataset.sizes["run"])]
    ends = [
        float(part[name].max()) * _factor(part, 1.0)
        for part in parts
        for name in ("loss_step", "kurtosis_step")
    ]
    return next(((unit, suffix) for unit, suffix in _UNITS if max(ends) >= 10 * unit), (1.0, ""))
