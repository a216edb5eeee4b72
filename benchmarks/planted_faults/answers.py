"""What monitor and diagnosis say of a run, in the few words that are scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from osp_diag.analyses.alerts import alerts
from osp_diag.analyses.diagnosis import findings as diagnosis_findings
from osp_diag.analyses.diagnosis.diagnose import diagnose
from osp_diag.runs.headline import hidden_states
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import HIDDEN_STATES, LOGGED_STEP, SEGMENTS, STEP
from osp_diag.trainer.laboratory import laboratory

__all__ = ["Finding", "alerts_by_step", "diagnosis_of", "kurtosis_by_step"]


@dataclass(frozen=True)
class Finding:
    """One cause that the diagnosis names; what it leaves open is None or empty.

    Attributes
    ----------
    after_step, by_step : the bracket: the last step without it (None: it was there from the start), and the
        first with it
    indices : of rows, columns, channels or heads
    remedy_verified : None where there is none, or none was tried
    """

    family: str
    cause: str
    confidence: str = ""
    after_step: int | None = None
    by_step: int | None = None
    parameters: tuple[str, ...] = ()
    site: str = ""
    layer: int | None = None
    indices: tuple[int, ...] = ()
    remedy_verified: bool | None = None


def diagnosis_of(path: Path, against: Path | None, verify: int) -> tuple[list[Finding], list[str]]:
    """What ``diagnose`` names, most certain first, and what it says has risen."""
    run, good = open_run(path), None if against is None else open_run(against)
    its_laboratory = None if good is None else laboratory(good)
    diagnosis = diagnose(run, laboratory(run), against=good, its_laboratory=its_laboratory, verify=verify)
    return [_finding(found) for found in diagnosis.findings], list(diagnosis.regression)


def _finding(found: diagnosis_findings.Finding) -> Finding:
    place, bracket, remedy = found.place, found.bracket, found.remedy
    indices = (place.row, place.column, place.channel, place.head)
    return Finding(
        family=found.family,
        cause=found.cause,
        confidence=found.confidence,
        after_step=None if bracket is None else bracket.good,
        by_step=None if bracket is None else bracket.bad,
        parameters=place.parameter,
        site=place.site or "",
        layer=place.layer,
        indices=tuple(index for index in indices if index is not None),
        remedy_verified=None if remedy is None else remedy.verified,
    )


def alerts_by_step(run: Run) -> dict[int, list[str]]:
    """Probed step → the rules that the monitor's alerts are of, had it been asked when that step had come.

    Only those that were not raised at the probe before.
    """
    by_step: dict[int, list[str]] = {}
    before: set[str] = set()
    for step in run.steps:
        raised = {alert.rule for alert in alerts(_up_to(run, int(step)))}
        if fresh := sorted(raised - before):
            by_step[int(step)] = fresh
        before = raised
    return by_step


def _up_to(run: Run, step: int) -> Run:
    """The run as it was after the probe of that step."""
    lasting = {STEP: run.steps <= step, LOGGED_STEP: run.series["step"].values <= step}
    nodes = {}
    for node in run.tree.subtree:
        dataset = node.to_dataset(inherit=False)
        present = {name: rows for name, rows in lasting.items() if name in dataset.dims}
        nodes[node.path] = dataset.isel(present)
    if segments := run.attrs.get(SEGMENTS):
        begun = [segment for segment in segments if segment["after_step"] < step]
        nodes["/"] = nodes["/"].assign_attrs({SEGMENTS: begun})
    return Run(xr.DataTree.from_dict(nodes), run.path)


def kurtosis_by_step(run: Run) -> dict[int, float]:
    """Probed step → mean OSP kurtosis of the hidden states, over all tokens; without those it is NaN at."""
    states = hidden_states({site: run.at(site) for site in HIDDEN_STATES if site in run.sites}).states
    mean = np.mean([state.sel(stratum="all").values for state in states], axis=0)
    return {
        int(step): float(value) for step, value in zip(run.steps, mean, strict=True) if np.isfinite(value)
    }
