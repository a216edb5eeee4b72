"""When a training went wrong: kurtosis and losses over steps, with the onset shaded and every finding marked.

What is marked is judged from the store alone, unless a diagnosis is given that asked checkpoints and replays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError
from osp_diag.figures._caption import caption
from osp_diag.figures._diagnoses import (
    FEWEST_STEPS,
    SHADE,
    Diagnosed,
    bracket_ends,
    diagnoses_of,
    padded,
    series_at,
    shade_bracket,
)
from osp_diag.figures._hidden_states import KURTOSIS, kurtosis_by_step
from osp_diag.figures._placement import ADAM_MIDWAY, InGallery, InReport
from osp_diag.figures._runs import nothing_finite
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

REPORT = InReport("When training went wrong", place=15, fewest_steps=FEWEST_STEPS, diagnosis=True)
GALLERY = InGallery(ADAM_MIDWAY, "The probes between which it rose, and the step of each finding.", place=161)
QUANTITIES = {
    "kurtosis": "OSP kurtosis\nosp_excess_kurtosis/1",
    "held_out_loss": "held-out loss\n(nats)",
    "loss": "training loss\n(nats)",
}
"""Quantity → label of its axis, from above."""

__all__ = ["GALLERY", "REPORT", "draw", "prepare"]


def prepare(runs: list[Run], *, diagnoses: Diagnosed = None) -> xr.Dataset:
    """Kurtosis, losses, and what a diagnosis finds.

    Parameters
    ----------
    diagnoses : files that ``osp-diag diagnose RUN --out NAME.json`` wrote; by default each run is judged here

    Returns
    -------
    ``kurtosis`` and ``held_out_loss`` (run, probe) at ``probe_step``, ``loss`` (run, record) at
    ``record_step``; ``good`` and ``bad`` (run), the probes between which something rose; ``onset`` (run,
    finding), the first step of each finding, whose cause is named in ``cause``. NaN and "" where a run has
    fewer.

    Raises
    ------
    StoreError : a run without a kurtosis of its hidden states, or of which nothing is finite
    """
    made = diagnoses_of(runs, diagnoses)
    steps = [step_of(run) for run in runs]
    probes = [kurtosis_by_step(run, "diagnosis_timeline") for run in runs]
    records = [run.series["step"].values.astype(float) for run in runs]
    held_out = [series_at(run, "held_out_loss", run.steps) for run in runs]
    losses = [series_at(run, "loss", at) for run, at in zip(runs, records, strict=True)]
    for run, (_, kurtosis), *others in zip(runs, probes, held_out, losses, strict=True):
        if not any(np.isfinite(part).any() for part in (kurtosis, *others)):
            raise StoreError(nothing_finite(run, "kurtosis and losses", "diagnosis_timeline"))
    brackets = [bracket_ends(diagnosis) for diagnosis in made]
    onsets = [
        np.array([np.nan if one.bracket is None else float(one.bracket.bad) for one in each.findings])
        for each in made
    ]
    dataset = xr.Dataset(
        {
            "kurtosis": (("run", "probe"), padded([kurtosis for _, kurtosis in probes])),
            "held_out_loss": (("run", "probe"), padded(held_out)),
            "loss": (("run", "record"), padded(losses)),
            "good": ("run", [good for good, _ in brackets]),
            "bad": ("run", [bad for _, bad in brackets]),
            "onset": (("run", "finding"), padded(onsets)),
            "cause": (("run", "finding"), _causes(made)),
        },
        coords={
            "run": labels_of(list(runs), steps),
            "probe_step": (("run", "probe"), padded([step for step, _ in probes])),
            "record_step": (("run", "record"), padded(records)),
        },
    )
    title = "Kurtosis and losses over training, with what changed"
    remarks = [_remark(str(label), one) for label, one in zip(dataset["run"].values, made, strict=True)]
    dataset.attrs = {"title": title, "caption": caption(title, runs, steps, [KURTOSIS], remarks)}
    return dataset


def _causes(diagnoses: Sequence[Diagnosis]) -> np.ndarray:
    width = max(len(diagnosis.findings) for diagnosis in diagnoses)
    rows = [[one.cause for one in each.findings] for each in diagnoses]
    return np.array([row + [""] * (width - len(row)) for row in rows], dtype=object).reshape(len(rows), width)


def _remark(label: str, diagnosis: Diagnosis) -> str:
    causes = "; ".join(
        f"({number}) {finding.cause}, {finding.confidence}"
        for number, finding in enumerate(diagnosis.findings, 1)
    )
    shaded = "shaded: the probes between which it rose; " if diagnosis.bracket is not None else ""
    return f"{label}: {shaded}{causes or 'nothing that was looked at differs'}"


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A column a run; a row for each quantity that a run has."""
    rows = [name for name in QUANTITIES if np.isfinite(dataset[name].values).any()]
    runs = dataset.sizes["run"]
    canvas = backend.canvas(
        len(rows), runs, width=style.widths[width], height=1.45 * len(rows) + 0.5, style=style
    )
    for column in range(runs):
        part = dataset.isel(run=column)
        for row, name in enumerate(rows):
            last = row == len(rows) - 1
            panel = canvas.panel(
                row,
                column,
                title=str(part["run"].item()) if row == 0 and runs > 1 else "",
                x_label="step" if last else "",
                y_label=QUANTITIES[name] if column == 0 else "",
            )
            _draw_quantity(part, name, panel, style.colours_of_runs(runs)[column])
            if row == 0:
                _mark(part, panel)
    return canvas


def _draw_quantity(part: xr.Dataset, name: str, panel: Panel, colour: str) -> None:
    steps = part["record_step" if name == "loss" else "probe_step"].values
    values = part[name].values
    finite = np.isfinite(values) & np.isfinite(steps)
    if not finite.any():
        panel.annotate(0.5, 0.5, "not recorded", centred=True)
        return
    low, high = float(values[finite].min()), float(values[finite].max())
    margin = 0.08 * (high - low) or 0.1 * max(abs(high), 1.0)
    low, high = low - margin, high + margin
    good = part["good"].item() if np.isfinite(part["good"].item()) else float(np.nanmin(steps))
    shade_bracket(panel, good, part["bad"].item(), low, high)
    for onset in np.unique(part["onset"].values[np.isfinite(part["onset"].values)]):
        panel.line(np.full(2, onset), np.array([low, high]), label="", colour=SHADE, dash="dashed")
    panel.line(steps[finite], values[finite], label="", colour=colour)
    panel.limits("y", low, high)
    every = np.concatenate([part["record_step"].values, part["probe_step"].values])
    first, last = float(np.nanmin(every)), float(np.nanmax(every))
    beside = 0.02 * (last - first) or 1.0
    panel.limits("x", first - beside, last + beside)


def _mark(part: xr.Dataset, panel: Panel) -> None:
    """The numbers of the findings above the step at which each began; the caption names them."""
    onsets = part["onset"].values
    places = np.unique(onsets[np.isfinite(onsets)])
    texts = [", ".join(f"({place + 1})" for place in np.flatnonzero(onsets == at)) for at in places]
    if texts:
        panel.marks([float(at) for at in places], texts)
