"""What each number on the page is, from the estimators themselves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from osp_diag.errors import EstimatorError
from osp_diag.runs.run import Run

__all__ = ["Definition", "definitions_of"]


@dataclass(frozen=True)
class Definition:
    """An estimator, in words."""

    identifier: str
    title: str = ""
    formula: str = ""
    explanation: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    """citation and address, which is http(s) or empty"""


def definitions_of(runs: Sequence[Run]) -> list[Definition]:
    """One for each estimator that any of the runs names, by identifier."""
    identifiers = sorted({str(name) for run in runs for name in run.estimators})
    return [_definition(name) for name in identifiers]


def _definition(identifier: str) -> Definition:
    from osp_diag.estimators import all_estimators

    try:
        estimator = all_estimators().get(identifier)
    except EstimatorError:
        estimator = None
    if estimator is None:
        return Definition(identifier, title="an estimator, or a version of one, that is not installed here")
    facts = (
        ("unit", estimator.unit),
        ("range", estimator.range),
        ("floor", estimator.floor),
        ("ceiling", estimator.ceiling),
        ("sites", ", ".join("any" if site == "*" else site for site in estimator.sites)),
    )
    return Definition(
        identifier,
        estimator.title,
        estimator.formula,
        (inspect.getdoc(estimator) or "").replace("``", ""),
        tuple((key, str(text)) for key, text in facts if text),
        tuple(
            (source.citation, source.url if source.url.startswith(("https://", "http://")) else "")
            for source in estimator.sources
        ),
    )
