"""A diagnosis as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from osp_diag.analyses.diagnosis.findings import Diagnosis, Finding

OUTCOMES = {True: "verified", False: "did not help", None: "tried"}
"""Whether a remedy that was tried did what it should → in words."""

__all__ = ["OUTCOMES", "diagnosis_as_text", "title_of", "what_is_named", "what_rose"]


def diagnosis_as_text(diagnosis: Diagnosis) -> str:
    """For the terminal."""
    return "\n".join(_lines(diagnosis))


def what_rose(diagnosis: Diagnosis) -> str:
    """What got worse, or that nothing did; empty where neither can be said."""
    if diagnosis.regression:
        return "Got worse: " + "; ".join(diagnosis.regression)
    if diagnosis.compared:
        return f"Nothing got worse: {' and '.join(diagnosis.compared)} did not rise."
    return ""


def what_is_named(diagnosis: Diagnosis) -> str:
    """What stands above the findings; empty where they are causes of what rose."""
    if not diagnosis.findings:
        return "No cause is named: nothing that was looked at differs."
    return "" if diagnosis.regression else "Changes without a regression:"


def title_of(finding: Finding) -> str:
    """The cause, how sure it is, and since when."""
    when = "" if finding.bracket is None else f", {finding.bracket}"
    return f"{finding.cause} [{finding.confidence}{when}]"


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    yield f"{diagnosis.run}"
    yield from filter(None, [what_rose(diagnosis)])
    if diagnosis.regression:
        before, after = diagnosis.checkpoints
        if before is not None:
            yield f"Checkpoints around it: {before} and {after if after is not None else 'none after it'}"
    yield from (f"Where: {place}" for place in diagnosis.where)
    yield ""
    yield from filter(None, [what_is_named(diagnosis)])
    for number, finding in enumerate(diagnosis.findings, 1):
        yield from _of_finding(number, finding)
    if diagnosis.ruled_out:
        yield "Looked at, without a finding:"
        yield from (f"  {sentence}" for sentence in diagnosis.ruled_out)
    if diagnosis.not_recorded:
        yield "Could not be asked:"
        yield from (f"  {sentence}" for sentence in diagnosis.not_recorded)


def _of_finding(number: int, finding: Finding) -> Iterator[str]:
    yield f"{number}. {title_of(finding)}"
    yield from (f"   {sentence}" for sentence in finding.evidence)
    if finding.remedy is not None:
        yield f"   to do: {finding.remedy.text}"
        if finding.remedy.command:
            yield f"     {finding.remedy.command}"
        if finding.remedy.outcome:
            yield f"     {OUTCOMES[finding.remedy.verified]}: {finding.remedy.outcome}"
    yield ""
