"""From runs to one page: the analyses are asked, the answers go into a template.

Why one file with everything in it: docs/decisions.md, Pages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osp_diag.analyses.emergence.history import Emergence, trace_emergence
from osp_diag.analyses.run_labels import labels_of
from osp_diag.analyses.summary.verdict import Verdict, verdict
from osp_diag.errors import OspDiagError, StoreError, UsageError
from osp_diag.figures._colours import sample
from osp_diag.figures._diagnoses import Diagnosed
from osp_diag.figures._registry import in_report
from osp_diag.figures._runs import open_runs
from osp_diag.figures.report.comparison import compared_pairs, key_numbers, others, sentences
from osp_diag.figures.report.definitions import definitions_of
from osp_diag.figures.report.diagnosis import diagnoses_by_place, page_diagnoses
from osp_diag.figures.report.encoding import script_json
from osp_diag.figures.report.explorer import explorer_data
from osp_diag.figures.report.heads import Heads, heads_of
from osp_diag.figures.report.heads import definitions as head_definitions
from osp_diag.figures.report.page import render_page
from osp_diag.figures.report.pictures import draw_figures
from osp_diag.figures.report.tables import channel_table, head_table, layer_table
from osp_diag.figures.styles import RUN_COLOURS
from osp_diag.monitoring import judge
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

__all__ = ["Report", "build_report", "check_out", "write_report"]

_SHOWN_DAMAGE = 6
PROBES, DRAWS, CHANNEL_PROBES = 96, 20, 24
"""Of the emergence of outliers: probed steps of onsets, bootstrap draws, probed steps of channels."""


@dataclass(frozen=True)
class Report:
    """A page, and what it says first."""

    html: str = field(repr=False)
    verdicts: tuple[Verdict, ...]
    labels: tuple[str, ...]
    left_out: tuple[str, ...]
    """figures that are not on the page, or not of all runs, with the reason"""


@dataclass(frozen=True)
class _RunVerdict:
    """What the page says of one run."""

    label: str
    verdict: Verdict
    emergence: Emergence | None
    problem: str
    """why there is no emergence"""
    statement: str


def write_report(runs: Any, out: str | os.PathLike[str], *, diagnoses: Diagnosed = None) -> Report:
    """Report on runs in one file that needs no network.

    Parameters
    ----------
    runs : an open run, the path of one, or a sequence of either
    out : the file to write, by custom ``*.html``
    diagnoses : files that ``osp-diag diagnose RUN --out NAME.json`` wrote, with what checkpoints and replays
        said; of the other trainings the page says what their records say

    Raises
    ------
    UsageError : no run, a file that cannot be written, or a diagnosis of none of the runs
    StoreError : a run that cannot be read, or holds no step
    """
    path = Path(out)
    check_out(path)
    report = build_report(runs, diagnoses=diagnoses)
    try:
        path.write_text(report.html, encoding="utf-8")
    except OSError as problem:
        raise UsageError(
            f"cannot write {path}: {problem.strerror or problem}; write elsewhere or make room"
        ) from problem
    return report


def check_out(path: Path) -> None:
    """Refuse, before any work, a file that cannot be written.

    Raises
    ------
    UsageError : it is a folder, its folder does not exist, or it does not end in .html
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {path}: a report is a page; let the name end in .html")
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; give a file")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: the folder {path.parent} does not exist; make it first")


def build_report(runs: Any, *, diagnoses: Diagnosed = None) -> Report:
    """As :func:`write_report`, without writing it."""
    run_list = open_runs(runs)
    steps = [step_of(run) for run in run_list]
    labels = labels_of(run_list, steps)
    diagnosed = page_diagnoses(run_list, labels, diagnoses)
    heads = [heads_of(run) for run in run_list]
    run_verdicts = [
        _run_verdict(run, label, head) for run, label, head in zip(run_list, labels, heads, strict=True)
    ]
    verdicts = [one.verdict for one in run_verdicts]
    pictures = draw_figures(run_list, labels, diagnoses_by_place(diagnosed))
    drawn = [picture for picture in pictures if picture.variants]
    words = head_definitions()
    tables = [
        layer_table(run_list, labels),
        head_table(heads, labels, words),
        channel_table(run_list, labels, [one.emergence for one in run_verdicts]),
    ]
    left_out = [
        f"{picture.name}: {reason}" for picture in pictures for reason in dict.fromkeys(picture.left_out)
    ]
    data = {
        "runs": explorer_data(run_list, labels),
        "heads": [{"rows": head.rows, "parts": head.parts} for head in heads],
        "head_words": words,
        "figures": [picture.variants for picture in drawn],
        "colours": {
            "magnitude": sample("batlow", 24),
            "share": sample("lipari_r", 24),
            "runs": RUN_COLOURS,
        },
    }
    html = render_page(
        title=f"{', '.join(labels)}: outliers and attention sinks",
        labels=labels,
        run_verdicts=run_verdicts,
        sentences=[*sentences(run_list, verdicts, labels), *_damage(run_list)],
        numbers=key_numbers(verdicts, labels) if len(run_list) > 1 else None,
        pairs=compared_pairs(run_list, labels),
        others=others(run_list, labels),
        diagnoses=diagnosed,
        figures=[(number, one, in_report(one.name).diagnosis) for number, one in enumerate(drawn)],
        left_out=left_out,
        tables=[table for table in tables if table.rows],
        definitions=definitions_of(run_list),
        provenance=[_provenance(run) for run in run_list],
        data=script_json(data),
    )
    return Report(html, tuple(verdicts), tuple(labels), tuple(left_out))


def _damage(runs: list[Run]) -> list[str]:
    """What is not on the page because it is damaged, in a sentence a run; by file names, not by paths."""
    texts = []
    for run in (run for run in runs if run.damage):
        problems = " ".join(f"{problem}." for problem in run.damage[:_SHOWN_DAMAGE])
        more = len(run.damage) - _SHOWN_DAMAGE
        texts.append(
            f"Damaged, and therefore not on this page: {problems.replace(str(run.path), run.path.name)}"  # type: ignore[union-attr]
            + (f" And {more} more." if more > 0 else "")
        )
    return texts


def _run_verdict(run: Run, label: str, head: Heads) -> _RunVerdict:
    emergence, problem = None, ""
    try:
        emergence = trace_emergence(
            run, strata=_strata(run), draws=DRAWS, probes=PROBES, channel_probes=CHANNEL_PROBES
        )
    except OspDiagError as reason:
        problem = str(reason)
    onsets = emergence.onsets if emergence is not None else None
    judgement = verdict(run, onsets=onsets, sinks=head.implementation)
    return _RunVerdict(label, judgement, emergence, problem, head.statement or head.problem)


def findings_of(run: Run) -> list[tuple[str, str]]:
    """What the monitor says of a run, as facts."""
    try:
        return [("monitor", finding.sentence) for finding in judge(run)]
    except StoreError as reason:  # of a damaged file, which the page names elsewhere
        return [("monitor", f"not judged: {reason}")]


def _strata(run: Run) -> list[str] | None:
    """Those that the text speaks of; of a run with other strata all."""
    for site in run.sites:
        if "osp_excess_kurtosis" in run.at(site):
            strata = [str(name) for name in run.at(site)["stratum"].values]
            return [name for name in ("first", "rest") if name in strata] or None
    return None


def _provenance(run: Run) -> list[tuple[str, str]]:
    """Everything that determines the numbers, in reading order."""
    facts = [(str(key).replace("_", " "), str(value)) for key, value in run.summary_attributes.items()]
    count = len(run.steps)
    span = f", from {int(run.steps[0]):,} to {int(run.steps[-1]):,}" if count > 1 else ""
    facts.append(("probed steps", f"{count:,}{span}"))
    facts += [("note", note) for note in run.notes]
    facts += findings_of(run)
    facts += [(f"without {site}", why) for site, why in run.absent_sites.items()]
    return facts
