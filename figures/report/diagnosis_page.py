"""A diagnosis as one file that needs no network: its words, and the figures that show its evidence."""

from __future__ import annotations

import os
from pathlib import Path

from markupsafe import Markup

from osp_diag import figures
from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures.report.build import check_out
from osp_diag.figures.report.page import render_diagnosis
from osp_diag.figures.report.pictures import report_figures
from osp_diag.runs.run import Run

__all__ = ["write_diagnosis"]


def write_diagnosis(run: Run, diagnosis: Diagnosis, out: str | os.PathLike[str]) -> None:
    """Write the page of a diagnosis of a run.

    What cannot be drawn of it is named there, with the reason.

    Raises
    ------
    UsageError : a file that cannot be written
    """
    path = Path(out)
    check_out(path)
    pictures, left_out = [], []
    for name, placement in report_figures().items():
        if placement.diagnosis:
            try:
                picture, caption = _picture(name, run, diagnosis)
                pictures.append((placement.heading, picture, caption))
            except StoreError as reason:
                left_out.append(str(reason))
    page = render_diagnosis(made=diagnosis, pictures=pictures, left_out=left_out)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror or problem}; write elsewhere") from problem


def _picture(name: str, run: Run, diagnosis: Diagnosis) -> tuple[Markup, str]:
    """The figure for a page that has the library already, and its caption."""
    dataset = figures.draw(name, run, backend="none", diagnoses=[diagnosis])
    caption = dataset.attrs.pop("caption")
    figure = figures.draw(name, dataset.assign_attrs(caption=""), backend="plotly")
    # plotly's own text, and no reader's.
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False)), str(caption)
