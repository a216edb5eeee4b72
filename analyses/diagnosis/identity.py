"""Which run a diagnosis was made of, told by what was recorded, so that it is drawn beside no other."""

from __future__ import annotations

import hashlib

import numpy as np

from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.runs.headline import headline_by_step
from osp_diag.runs.run import Run

__all__ = ["fingerprint", "is_of", "last_step"]


def last_step(run: Run) -> int | None:
    """The last step that the run has, probed or logged."""
    steps = [int(steps[-1]) for steps in (run.steps, run.series["step"].values) if len(steps)]
    return max(steps, default=None)


def fingerprint(run: Run, until: int | None = None) -> str:
    """Sixteen digits of what was recorded up to a step: kurtosis at each probe, loss at each logged step."""
    digest = hashlib.sha256()
    for values in (headline_by_step(run), run.series.get("loss")):
        if values is not None:
            values = values if until is None else values.sel(step=values["step"] <= until)
            for column in (values["step"].values, values.values):
                digest.update(np.ascontiguousarray(column, dtype="<f8").tobytes())
    return digest.hexdigest()[:16]


def is_of(diagnosis: Diagnosis, run: Run) -> bool:
    """Whether a diagnosis was made of this run, which may have grown since."""
    end = last_step(run)
    within = diagnosis.last_step is None or (end is not None and diagnosis.last_step <= end)
    return within and diagnosis.fingerprint == fingerprint(run, diagnosis.last_step)
