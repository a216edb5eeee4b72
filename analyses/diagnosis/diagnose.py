"""The seven questions in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from osp_diag.analyses.diagnosis.batches import changed_batches
from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.conditions import changed_conditions
from osp_diag.analyses.diagnosis.edits import edited_weights
from osp_diag.analyses.diagnosis.experiments import experiments, verified
from osp_diag.analyses.diagnosis.findings import CONFIDENCES, Bracket, Diagnosis, Finding
from osp_diag.analyses.diagnosis.first_jumps import first_jumps
from osp_diag.analyses.diagnosis.function import changed_function
from osp_diag.analyses.diagnosis.identity import fingerprint, last_step
from osp_diag.analyses.diagnosis.precision import narrower_weights
from osp_diag.analyses.diagnosis.rates import jumped_rates
from osp_diag.analyses.diagnosis.recipe import missing_parts
from osp_diag.analyses.diagnosis.remedies import with_remedy
from osp_diag.analyses.diagnosis.replays import replayed
from osp_diag.analyses.diagnosis.settings import changed_settings
from osp_diag.analyses.diagnosis.standing import standing_parameters
from osp_diag.analyses.diagnosis.when import is_raised, regression_of
from osp_diag.analyses.diagnosis.where import places
from osp_diag.analyses.run_labels import run_name
from osp_diag.laboratory import Laboratory
from osp_diag.runs.run import Run

__all__ = ["diagnose"]

QUESTIONS: tuple[Callable[[Case], Iterable[Finding]], ...] = (
    changed_conditions,
    changed_settings,
    jumped_rates,
    changed_function,
    changed_batches,
    narrower_weights,
    standing_parameters,
    edited_weights,
    missing_parts,
)
"""In the order in which they are asked: later ones leave out what earlier ones explain."""


def diagnose(
    run: Run,
    laboratory: Laboratory | None = None,
    *,
    against: Run | None = None,
    its_laboratory: Laboratory | None = None,
    replay: int | None = None,
    verify: int = 0,
) -> Diagnosis:
    """When outliers or the loss rose, where, why, and what to do.

    The questions, in this order: when; whether configuration, owners, rates, function, batches, precision or
    weights changed; a replay from the last good checkpoint; where and who wrote it; and, if all of that is
    silent and ``replay`` allows it, counterfactual edits and short trainings with a part of the recipe put
    back, each beside a control. All findings are listed. Nothing is written into the run.

    Parameters
    ----------
    run : of a training
    laboratory : reads its checkpoints and trains beside it (:func:`osp_diag.trainer.laboratory`); None: what
        needs that is named as not recorded
    against, its_laboratory : a good run, whose configuration and function count as right
    replay : steps that may be trained again; None: a replay that takes seconds; 0: none
    verify : steps for which each remedy is tried from before the onset; 0: none is

    Returns
    -------
    Diagnosis : findings with confidence, evidence and remedy; what was ruled out; what was not recorded
    """
    case = Case(run, laboratory, against, its_laboratory)
    if laboratory is None:
        case.not_recorded.append(f"weights, optimizers, the function and replays: {_why_none(run)}")
    regression = regression_of(case)
    case.not_recorded += [
        f"whether {quantity} rose: fewer than two probes have it"
        for quantity in ("kurtosis", "held-out loss")
        if not any(name.replace("validation", "held-out") == quantity for name in regression.compared)
    ]
    case.regression_bracket, case.is_raised = regression.bracket, is_raised(case)
    for question in QUESTIONS:
        case.findings += _joined(question(case), case.findings)
    case.findings += replayed(case, replay)
    if replay and case.trains:
        case.findings += experiments(case, replay)
    findings = [with_remedy(case, finding) for finding in sorted(case.findings, key=_order)]
    if verify and case.trains:
        findings = [verified(case, finding, verify) for finding in findings]
    good = None if case.regression_bracket is None else case.regression_bracket.good
    before = case.checkpoint_up_to(good)
    after = None if before is None else case.checkpoint_after(before.step)
    return Diagnosis(
        run=run_name(run),
        regression=regression.sentences,
        compared=regression.compared,
        bracket=regression.bracket,
        checkpoints=(before.step if before else None, after.step if after else None),
        findings=tuple(findings),
        where=tuple(places(case)),
        ruled_out=tuple(dict.fromkeys(case.ruled_out)),
        not_recorded=tuple(
            dict.fromkeys((*(() if laboratory is None else laboratory.missing), *case.not_recorded))
        ),
        jumps=first_jumps(case.monitor),
        replay=case.replay,
        last_step=last_step(run),
        fingerprint=fingerprint(run),
    )


def _why_none(run: Run) -> str:
    """Why no laboratory answers."""
    if "routing" in run.attrs:
        return "this is judged from the records alone; `osp-diag diagnose RUN` reads the checkpoints too"
    return (
        "this is no run of `osp-diag train` on disk, whose checkpoints could be read, and it names none; "
        "name their directory with --checkpoints (checkpoints=)"
    )


def _order(finding: Finding) -> tuple[int, int]:
    return list(CONFIDENCES).index(finding.confidence), finding.bracket.bad if finding.bracket else 0


def _joined(new: Iterable[Finding], known: list[Finding]) -> Iterator[Finding]:
    """New findings; one that says again what is known joins its evidence."""
    for finding in new:
        for place, other in enumerate(known):
            if other.family == finding.family and _overlap(other, finding):
                known[place] = replace(
                    other,
                    bracket=_narrower(other.bracket, finding.bracket),
                    evidence=tuple(dict.fromkeys((*other.evidence, *finding.evidence))),
                )
                break
        else:
            yield finding


def _narrower(one: Bracket | None, two: Bracket | None) -> Bracket | None:
    """The second where it lies within the first."""
    if one is None or two is None or two.good is None:
        return one if one is not None else two
    return two if (one.good or 0) <= two.good and two.bad <= one.bad else one


def _overlap(one: Finding, two: Finding) -> bool:
    first, second = one.bracket or Bracket(None, 0), two.bracket or Bracket(None, 0)
    in_time = (first.good or 0) < second.bad and (second.good or 0) < first.bad
    names, others = set(one.place.parameter), set(two.place.parameter)
    return in_time and (not names or not others or bool(names & others))
