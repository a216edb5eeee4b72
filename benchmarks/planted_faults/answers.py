"""What monitor and diagnosis say of a run, in the few words that are scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from osp_diag.analyses.diagnosis import findings as diagnosis_findings
from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.diagnose import diagnose
from osp_diag.analyses.diagnosis.experiments import experiments
from osp_diag.analyses.diagnosis.recipe import RECIPE
from osp_diag.analyses.diagnosis.when import is_raised, regression_of
from osp_diag.laboratory import Fork
from osp_diag.monitoring import judge
from osp_diag.runs.headline import headline_by_step
from osp_diag.runs.run import Run, open_run
from osp_diag.trainer.laboratory import laboratory

__all__ = ["Finding", "alerts_by_step", "diagnosis_of", "experiments_of", "kurtosis_by_step"]


@dataclass(frozen=True)
class Finding:
    """One cause that the diagnosis names; what it leaves open is None or empty.

    Attributes
    ----------
    after_step, by_step : the bracket: the last step without it (None: it was there from the start), and the
        first with it
    indices : of rows, columns, channels or heads
    remedy_verified : None where there is none, or none was tried
    remedied : (step, kurtosis, held-out loss) at the end of the training that tried it; None: there was none
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
    remedied: tuple[int, float, float] | None = None


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
        remedied=None if remedy is None or remedy.fork is None else _end_of(remedy.fork),
    )


def _end_of(fork: Fork) -> tuple[int, float, float]:
    return fork.steps[-1], fork.kurtosis[-1], fork.held_out_loss[-1]


def experiments_of(path: Path, steps: int) -> list[str] | None:
    """Families that the seventh question names by itself, strongest first, as if no other had been asked.

    None where it has nothing to try: kurtosis is not raised, or the run has every part of the recipe.
    """
    run = open_run(path)
    case = Case(run, laboratory(run))
    case.regression_bracket, case.is_raised = regression_of(case).bracket, is_raised(case)
    config = case.config_at(1)
    if not case.is_raised or all(config.get(key) in values for key, (_, values, _, _) in RECIPE.items()):
        return None
    return [finding.family for finding in experiments(case, steps)]


def alerts_by_step(run: Run) -> dict[int, list[str]]:
    """Step → the rules by which the monitor found something there; it never looks ahead."""
    by_step: dict[int, list[str]] = {}
    for finding in judge(run):
        rules = by_step.setdefault(finding.step, [])
        if finding.rule not in rules:
            rules.append(finding.rule)
    return by_step


def kurtosis_by_step(run: Run) -> dict[int, float]:
    """Probed step → mean OSP kurtosis of the hidden states, over all tokens; without those it is NaN at."""
    kurtosis = headline_by_step(run)
    if kurtosis is None:
        return {}
    return {int(step): float(value) for step, value in zip(kurtosis["step"], kurtosis, strict=True)}
