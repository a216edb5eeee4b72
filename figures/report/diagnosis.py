"""The diagnoses of a page: saved ones, and of the other trainings what their records say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from osp_diag.analyses.diagnosis.diagnose import diagnose
from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.figures._diagnoses import FEWEST_STEPS, Diagnosed, saved_diagnoses
from osp_diag.figures.report.pictures import reason_of
from osp_diag.runs.run import Run

__all__ = ["PageDiagnosis", "diagnoses_by_place", "page_diagnoses"]


@dataclass(frozen=True)
class PageDiagnosis:
    """What the page says of one training.

    Attributes
    ----------
    place : of the run on the page
    made : None where it failed, for which ``problem`` says why
    is_saved : whether it comes from a file, with all that was asked then
    """

    place: int
    label: str
    made: Diagnosis | None
    problem: str
    is_saved: bool


def page_diagnoses(runs: Sequence[Run], labels: Sequence[str], diagnoses: Diagnosed) -> list[PageDiagnosis]:
    """Of every run that is a training: a few probed steps or more.

    Raises
    ------
    UsageError : a file that is no diagnosis, or a diagnosis of none of these runs
    """
    saved = saved_diagnoses(runs, diagnoses)
    entries = []
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        if place in saved:
            made = _without_folders(saved[place], run)
            entries.append(PageDiagnosis(place, label, made, "", is_saved=True))
        elif len(run.steps) >= FEWEST_STEPS:
            entries.append(PageDiagnosis(place, label, *_made(run), is_saved=False))
    return entries


def _without_folders(made: Diagnosis, run: Run) -> Diagnosis:
    """Without the folder of the run, which is nobody else's business, in any sentence or command."""
    folder = "" if run.path is None else f"{run.path.absolute().parent}/"

    def short(text: str) -> str:
        return text.replace(folder, "") if folder else text

    findings = []
    for finding in made.findings:
        remedy = finding.remedy
        if remedy is not None:
            remedy = replace(remedy, text=short(remedy.text), command=short(remedy.command))
        findings.append(replace(finding, evidence=tuple(map(short, finding.evidence)), remedy=remedy))
    return replace(
        made, findings=tuple(findings), not_recorded=tuple(short(text) for text in made.not_recorded)
    )


def _made(run: Run) -> tuple[Diagnosis | None, str]:
    try:
        return diagnose(run), ""
    except Exception as error:  # what fails here takes nothing else off the page
        return None, reason_of(error)


def diagnoses_by_place(entries: Sequence[PageDiagnosis]) -> Mapping[int, Diagnosis]:
    """Those that were made, by the place of their run."""
    return {entry.place: entry.made for entry in entries if entry.made is not None}
