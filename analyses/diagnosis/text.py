"""A diagnosis as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from osp_diag.analyses.diagnosis.findings import Diagnosis, Finding

__all__ = ["diagnosis_as_text"]


def diagnosis_as_text(diagnosis: Diagnosis) -> str:
    """For the terminal."""
    return "\n".join(_lines(diagnosis))


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    yield f"{diagnosis.run}"
    if diagnosis.regression:
        yield "Got worse: " + "; ".join(diagnosis.regression)
        before, after = diagnosis.checkpoints
        if before is not None:
            yield f"Checkpoints around it: {before} and {after if after is not None else 'none after it'}"
    elif diagnosis.compared:
        yield f"Nothing got worse: {' and '.join(diagnosis.compared)} did not rise."
    yield from (f"Where: {place}" for place in diagnosis.where)
    yield ""
    if not diagnosis.findings:
        yield "No cause is named: nothing that was looked at differs."
    elif not diagnosis.regression:
        yield "Changes without a regression:"
    for number, finding in enumerate(diagnosis.findings, 1):
        yield from _of_finding(number, finding)
    if diagnosis.ruled_out:
        yield "Looked at, without a finding:"
        yield from (f"  {sentence}" for sentence in diagnosis.ruled_out)
    if diagnosis.not_recorded:
        yield "Could not be asked:"
        yield from (f"  {sentence}" for sentence in diagnosis.not_recorded)


def _of_finding(number: int, finding: Finding) -> Iterator[str]:
    when = "" if finding.bracket is None else f", {finding.bracket}"
    yield f"{number}. {finding.cause} [{finding.confidence}{when}]"
    yield from (f"   {sentence}" for sentence in finding.evidence)
    if finding.remedy is not None:
        yield f"   to do: {finding.remedy.text}"
        if finding.remedy.command:
            yield f"     {finding.remedy.command}"
        if finding.remedy.outcome:
            kind = {True: "verified", False: "did not help", None: "tried"}[finding.remedy.verified]
            yield f"     {kind}: {finding.remedy.outcome}"
    yield ""
