"""A diagnosis as one file that needs no network: its text, and the figure ``diagnosis_timeline``."""

from __future__ import annotations

import os
from pathlib import Path

from markupsafe import Markup

from osp_diag import figures
from osp_diag.analyses.diagnosis.findings import Diagnosis
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures.diagnosis_timeline import timeline
from osp_diag.figures.report.build import check_out
from osp_diag.runs.run import Run

__all__ = ["write_diagnosis"]

PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Diagnosis of {name}</title>
<style>
body {{ margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: #1a1a1a; background: #fff; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }}
</style>
</head>
<body>
<h1>Diagnosis of {name}</h1>
<pre>{text}</pre>
{picture}
</body>
</html>
""")


def write_diagnosis(run: Run, diagnosis: Diagnosis, out: str | os.PathLike[str]) -> None:
    """Write the page of a diagnosis of a run.

    Where the run has too little for the figure, the page says so in its place.

    Raises
    ------
    UsageError : a file that cannot be written
    """
    path = Path(out)
    check_out(path)
    page = PAGE.format(name=diagnosis.run, text=str(diagnosis), picture=_picture(run, diagnosis))
    try:
        path.write_text(str(page), encoding="utf-8")
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror or problem}; write elsewhere") from problem


def _picture(run: Run, diagnosis: Diagnosis) -> Markup:
    try:
        dataset = timeline([run], [diagnosis])
    except StoreError as error:
        return Markup("<p>No figure: {}</p>").format(str(error))
    dataset.attrs["figure"] = "diagnosis_timeline"
    figure = figures.draw("diagnosis_timeline", dataset, backend="plotly")
    # With the library inside, which is plotly's own text and no reader's.
    return Markup(figure.to_html(full_html=False, include_plotlyjs=True))
