"""Whether the remedy helps: kurtosis and loss of a training with it, beside what happened without.

From a diagnosis that tried its remedies: ``osp-diag diagnose RUN --verify 30 --out NAME.json``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.analyses.diagnosis.text import OUTCOMES
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError
from osp_diag.figures._caption import caption
from osp_diag.figures._diagnoses import (
    FEWEST_STEPS,
    Diagnosed,
    bracket_ends,
    diagnoses_of,
    how_to_save,
    padded,
    series_at,
    shade_bracket,
)
from osp_diag.figures._hidden_states import KURTOSIS, kurtosis_by_step
from osp_diag.figures._placement import ADAM_MIDWAY, InGallery, InReport
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import RUN_COLOURS, Style
from osp_diag.laboratory import Fork
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

REPORT = InReport(
    "What the remedy does, beside what happened", place=18, fewest_steps=FEWEST_STEPS, diagnosis=True
)
GALLERY = InGallery(ADAM_MIDWAY, "Kurtosis and loss with OSP put back, beside what happened.", place=164)
QUANTITIES = {
    "kurtosis": "OSP kurtosis\nosp_excess_kurtosis/1",
    "held_out_loss": "held-out loss\n(nats)",
}

__all__ = ["GALLERY", "REPORT", "draw", "prepare"]


def prepare(runs: list[Run], *, diagnoses: Diagnosed = None) -> xr.Dataset:
    """Each remedy that was tried, and the run over the same steps.

    Parameters
    ----------
    diagnoses : files that ``osp-diag diagnose RUN --verify N --out NAME.json`` wrote

    Returns
    -------
    ``kurtosis`` and ``held_out_loss`` (run, probe) of what happened at ``probe_step``; ``fork_kurtosis`` and
    ``fork_held_out_loss`` (run, remedy, fork_probe) at ``fork_step``; ``remedy_label`` (run, remedy), the
    numbers of the findings that it is of; ``good`` and ``bad`` (run), the probes between which something
    rose. NaN and "" where a run has fewer.

    Raises
    ------
    StoreError : no remedy was tried, or a run without a kurtosis of its hidden states
    """
    made = diagnoses_of(runs, diagnoses)
    tried = [_tried(run, one) for run, one in zip(runs, made, strict=True)]
    steps = [step_of(run) for run in runs]
    probes = [kurtosis_by_step(run, "remedy_curve") for run in runs]
    forks = [[fork for fork, _ in of_run] for of_run in tried]
    held_out = [series_at(run, "held_out_loss", run.steps) for run in runs]
    brackets = [bracket_ends(one) for one in made]
    dataset = xr.Dataset(
        {
            "kurtosis": (("run", "probe"), padded([kurtosis for _, kurtosis in probes])),
            "held_out_loss": (("run", "probe"), padded(held_out)),
            "fork_kurtosis": (("run", "remedy", "fork_probe"), _curves(forks, "kurtosis")),
            "fork_held_out_loss": (("run", "remedy", "fork_probe"), _curves(forks, "held_out_loss")),
            "good": ("run", [good for good, _ in brackets]),
            "bad": ("run", [bad for _, bad in brackets]),
        },
        coords={
            "run": labels_of(runs, steps),
            "probe_step": (("run", "probe"), padded([step for step, _ in probes])),
            "fork_step": (("run", "remedy", "fork_probe"), _curves(forks, "steps")),
            "remedy_label": (("run", "remedy"), _labels(tried)),
        },
    )
    title = "The remedies that were tried, beside what happened"
    remarks = [_remark(str(label), one) for label, one in zip(dataset["run"].values, made, strict=True)]
    dataset.attrs = {"title": title, "caption": caption(title, runs, steps, [KURTOSIS], remarks)}
    return dataset


Tried = list[tuple[Fork, list[int]]]
"""Trainings with a remedy, each with the numbers of the findings that it is of."""


def _tried(run: Run, diagnosis: Diagnosis) -> Tried:
    tried: Tried = []
    for number, finding in enumerate(diagnosis.findings, 1):
        fork = None if finding.remedy is None else finding.remedy.fork
        if fork is None:
            continue
        numbers = next((numbers for other, numbers in tried if other == fork), None)
        if numbers is None:
            tried.append((fork, [number]))
        else:
            numbers.append(number)
    if not tried:
        raise StoreError(
            f"remedy_curve: the diagnosis of {model_name(run.attrs)} tried no remedy; "
            f"{how_to_save('--verify 30')}"
        )
    return tried


def _curves(forks: Sequence[Sequence[Fork]], name: str) -> np.ndarray:
    """One number of every fork at its probes, (run, remedy, probe)."""
    most = max(map(len, forks))
    width = max(len(fork.steps) for of_run in forks for fork in of_run)
    values = np.full((len(forks), most, width), np.nan)
    for row, of_run in enumerate(forks):
        for place, fork in enumerate(of_run):
            values[row, place, : len(fork.steps)] = getattr(fork, name)
    return values


def _labels(tried: Sequence[Tried]) -> np.ndarray:
    most = max(map(len, tried))
    rows = [[", ".join(f"({number})" for number in numbers) for _, numbers in of_run] for of_run in tried]
    return np.array([row + [""] * (most - len(row)) for row in rows], dtype=object).reshape(len(rows), most)


def _remark(label: str, diagnosis: Diagnosis) -> str:
    shaded = "shaded: the probes between which it rose; " if diagnosis.bracket is not None else ""
    remedies = [
        f"({number}) {finding.cause}, from step {finding.remedy.start}: {OUTCOMES[finding.remedy.verified]}"
        for number, finding in enumerate(diagnosis.findings, 1)
        if finding.remedy is not None and finding.remedy.fork is not None
    ]
    return f"{label}: {shaded}{'; '.join(remedies)}"


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A column a run: what happened as a line, each remedy dashed; over the steps about the trial."""
    rows = [name for name in QUANTITIES if np.isfinite(dataset[f"fork_{name}"].values).any()]
    rows = rows or ["kurtosis"]
    runs = dataset.sizes["run"]
    canvas = backend.canvas(
        len(rows), runs, width=style.widths[width], height=0.5 + 1.7 * len(rows), style=style
    )
    panels = []
    for column in range(runs):
        part = dataset.isel(run=column)
        for row, name in enumerate(rows):
            panel = canvas.panel(
                row,
                column,
                title=str(part["run"].item()) if row == 0 and runs > 1 else "",
                x_label="step" if row == len(rows) - 1 else "",
                y_label=QUANTITIES[name] if column == 0 else "",
            )
            own = style.colours_of_runs(runs)
            remedies = [colour for colour in RUN_COLOURS if colour not in own] or list(style.palette)
            _draw_quantity(part, name, panel, own[column], remedies)
            panels.append(panel)
    most = max(panels[:: len(rows)], key=lambda panel: int((dataset["remedy_label"] != "").sum()))
    canvas.legend(most)
    return canvas


def _draw_quantity(part: xr.Dataset, name: str, panel: Panel, colour: str, remedies: Sequence[str]) -> None:
    forks, fork_steps = part[f"fork_{name}"].values, part["fork_step"].values
    first, last = float(np.nanmin(fork_steps)), float(np.nanmax(fork_steps))
    beside = max(0.5 * (last - first), 1.0)
    steps, values = part["probe_step"].values, part[name].values
    near = np.isfinite(values) & (steps >= first - beside) & (steps <= last + beside)
    every = np.concatenate([values[near], forks[np.isfinite(forks)]])
    if not every.size:
        panel.annotate(0.5, 0.5, "not recorded", centred=True)
        return
    margin = 0.08 * float(np.ptp(every)) or 0.1 * max(abs(float(every.max())), 1.0)
    low, high = float(every.min()) - margin, float(every.max()) + margin
    good = part["good"].item()
    shade_bracket(panel, good if np.isfinite(good) else first - beside, part["bad"].item(), low, high)
    panel.line(steps[near], values[near], label="what happened", colour=colour)
    labels = [str(label) for label in part["remedy_label"].values if str(label)]
    for place, label in enumerate(labels):
        known = np.isfinite(forks[place])
        panel.line(
            fork_steps[place][known],
            forks[place][known],
            label=f"with the remedy of {label}",
            colour=remedies[place % len(remedies)],
            dash="dashed",
        )
    panel.limits("y", low, high)
    panel.limits("x", max(first - beside, 0.0), min(last + beside, max(last, float(np.nanmax(steps)))))
