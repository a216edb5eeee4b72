"""``osp-diag report``: one page on a run, or on several."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

import tyro

from osp_diag.errors import UsageError

VERB = "report"
HELP = "make one page of a run or several: the verdict, and interactive figures"

Runs = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN...")]


def run(
    runs: Runs,
    /,
    *,
    out: Path = Path("report.html"),
    diagnosis: tuple[Path, ...] = (),
    json: bool = False,
) -> int:
    """Make one self-contained page that says what is wrong with a model and where, or that nothing is.

    The verdict comes first, in words and numbers, then the figures: layers, channels and heads can be
    chosen in any of them, a slider goes through the steps of a training, and two or more runs stand side by
    side on shared scales. The file needs no network; it can be sent, printed, and used with the keyboard
    alone. What a run does not hold is left out, and the page says so. Of a training the page says when
    outliers or the loss rose and what changed, as far as its records tell.

    Of a damaged run the page shows what is whole and says what is not. The exit code is 1 if a run is
    damaged or holds NaN or Inf, else 0.

    Args:
        runs: the runs, which `osp-diag probe` or a training wrote.
        out: the file to write.
        diagnosis: what `osp-diag diagnose RUN --out NAME.json` saved of these runs, with its replays and
            tried remedies.
        json: print the findings as JSON.

    Examples:
        osp-diag report run.zarr --out report.html
        osp-diag report adam.zarr osp.zarr --out adam-and-osp.html
        osp-diag report osp.zarr --diagnosis osp.json
    """
    from osp_diag.figures.report import check_out, write_report
    from osp_diag.runs.run import open_whole_part

    if not runs:
        raise UsageError("report: give at least one run, the path that `osp-diag probe --out` wrote")
    check_out(out)
    opened = [open_whole_part(path) for path in runs]
    for problem in (problem for one in opened for problem in one.damage):
        print(f"report: left out, {problem}", file=sys.stderr)
    report = write_report(opened, out, diagnoses=[str(path) for path in diagnosis])
    if json:
        verdicts = [verdict.as_dict() for verdict in report.verdicts]
        damage = [problem for one in opened for problem in one.damage]
        facts = {"out": str(out), "runs": verdicts, "left_out": list(report.left_out), "damaged": damage}
        print(json_format.dumps(facts, indent=2, ensure_ascii=False))
    else:
        for label, verdict in zip(report.labels, report.verdicts, strict=True):
            print(f"{label}: {verdict.headline}.")
        print(f"\nreport: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    damaged = any(one.damage for one in opened)
    return int(damaged or any(verdict.state == "broken" for verdict in report.verdicts))
