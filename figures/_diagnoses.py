"""Where the figures of a diagnosis have it from, and how they show when something began."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from osp_diag.analyses.diagnosis.diagnose import diagnose
from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.analyses.diagnosis.identity import is_of
from osp_diag.analyses.diagnosis.saved import read_diagnosis
from osp_diag.errors import UsageError
from osp_diag.figures.backend import Panel
from osp_diag.runs.run import Run

__all__ = [
    "FEWEST_STEPS",
    "SHADE",
    "Diagnosed",
    "bracket_ends",
    "diagnoses_of",
    "how_to_save",
    "padded",
    "saved_diagnoses",
    "series_at",
    "shade_bracket",
]

FEWEST_STEPS = 3
"""Probed steps from which on a page has a diagnosis: of two, one may be the initialisation."""
SHADE = "#9a9a9a"

Diagnosed = str | Sequence[Diagnosis | str] | None
"""What the option ``diagnoses`` of these figures takes: files that ``osp-diag diagnose RUN --out NAME.json``
wrote, or diagnoses, in any order; runs without one are judged by their records alone."""


def diagnoses_of(runs: Sequence[Run], diagnoses: Diagnosed) -> list[Diagnosis]:
    """One diagnosis a run, in the order of the runs; of those without one by their records alone.

    Raises
    ------
    UsageError : a file that is no diagnosis, or a diagnosis of none of these runs
    """
    by_run = saved_diagnoses(runs, diagnoses)
    return [by_run[place] if place in by_run else diagnose(run) for place, run in enumerate(runs)]


def saved_diagnoses(runs: Sequence[Run], diagnoses: Diagnosed) -> dict[int, Diagnosis]:
    """The place of a run → the diagnosis that was made of it.

    Raises
    ------
    UsageError : a file that is no diagnosis, or a diagnosis of none of these runs
    """
    entries = [diagnoses] if isinstance(diagnoses, str) else list(diagnoses or ())
    by_run: dict[int, Diagnosis] = {}
    for entry in entries:
        made = entry if isinstance(entry, Diagnosis) else read_diagnosis(entry)
        places = [place for place, run in enumerate(runs) if is_of(made, run)]
        if not places:
            name = "the diagnosis" if isinstance(entry, Diagnosis) else Path(entry).name
            raise UsageError(
                f"{name} is of {made.run} up to step {made.last_step}, and of no run that is drawn, as these "
                "are now; diagnose the run again (a training that was taken back to an earlier step is "
                "another one)"
            )
        by_run |= dict.fromkeys(places, made)
    return by_run


def how_to_save(options: str) -> str:
    """What to type where a diagnosis lacks something."""
    return (
        f"save one with `osp-diag diagnose RUN {options} --out NAME.json`, and give it to `osp-diag report` "
        "as --diagnosis NAME.json or to `osp-diag figure` as --option diagnoses=NAME.json"
    )


def bracket_ends(diagnosis: Diagnosis) -> tuple[float, float]:
    """(last good, first bad) step, NaN for none."""
    bracket = diagnosis.bracket
    if bracket is None:
        return np.nan, np.nan
    return np.nan if bracket.good is None else float(bracket.good), float(bracket.bad)


def series_at(run: Run, name: str, steps: np.ndarray) -> np.ndarray:
    """A series of the run at some steps, NaN where it has none."""
    series = run.series
    if name not in series:
        return np.full(len(steps), np.nan)
    return np.asarray(series[name].reindex(step=steps).values, dtype=float)


def shade_bracket(panel: Panel, good: float, bad: float, low: float, high: float) -> None:
    """The steps between which something began, from ``low`` to ``high``; nothing where ``bad`` is NaN."""
    if np.isfinite(bad):
        foot, top = np.full(2, low), np.full(2, high)
        panel.line(np.array([good, bad]), foot, label="", colour=SHADE, lower=foot, upper=top)


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of numbers below one another, each filled up with NaN."""
    width = max(map(len, rows))
    return np.stack(
        [np.pad(row.astype(float), (0, width - len(row)), constant_values=np.nan) for row in rows]
    )
