"""The diagnosis on the page: made when an alert comes, of what is recorded alone, while the page goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osp_diag.analyses.diagnosis.diagnose import diagnose
from osp_diag.analyses.diagnosis.findings import Diagnosis, Finding
from osp_diag.analyses.diagnosis.text import title_of, what_is_named, what_rose
from osp_diag.analyses.live import Standing
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import OspDiagError
from osp_diag.figures._diagnoses import FEWEST_STEPS
from osp_diag.figures.live._figures import REST, picture_of
from osp_diag.figures.report.pictures import reason_of
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.run import Run

__all__ = ["FIGURES", "AlertDiagnoses", "Panel", "words"]

FIGURES = ("diagnosis_timeline", "first_jumps")
"""What is drawn of a diagnosis by the records; the others need replays and trained remedies."""
Alerts = tuple[tuple[str, int], ...]
"""Rule and step of each alert of a run: with others a diagnosis is made anew."""


@dataclass(frozen=True)
class Panel:
    """What the page shows of the runs that have an alert.

    Attributes
    ----------
    version : of the alerts
    entries : label, diagnosis and why there is none, by run
    pictures : plotly's dictionaries by the name of the figure; None where it cannot be drawn
    left_out : why
    """

    version: str
    entries: tuple[tuple[str, Diagnosis | None, str], ...]
    pictures: Mapping[str, dict[str, Any] | None]
    left_out: tuple[str, ...]


class AlertDiagnoses:
    """Diagnoses for all browsers that look at a page: one at a time, in a thread of its own."""

    def __init__(self, runs: Sequence[FollowedRun]) -> None:
        self.runs = list(runs)
        self._made: dict[int, tuple[Alerts, Run, Diagnosis | None, str]] = {}
        self._panels: dict[tuple[int, ...], Panel] = {}
        self._thread: threading.Thread | None = None
        self._rests_until = 0.0

    def look(self, standings: Sequence[Standing], places: Sequence[int]) -> Panel | None:
        """The last panel of these runs; another is begun where an alert came since, if none is being made.

        Call it while the runs are still (:meth:`osp_diag.figures.live._page.Watched.still`): what is judged
        is what they hold then. None: no run of these has an alert, or the first panel is being made.
        """
        alerts = {place: _alerts_of(standings[place]) for place in places if standings[place].alerts}
        alerted = tuple(alerts)
        if not alerted:
            return None
        panel = self._panels.get(alerted)
        version = repr(alerts)
        if (panel is None or panel.version != version) and self._is_free():
            try:
                moments = {place: self.runs[place].moment() for place in alerted}
            except OspDiagError:  # a file is damaged, which the run's card says
                return panel
            self._thread = threading.Thread(
                target=self._make, args=(version, alerts, moments, labels_of(self.runs)), daemon=True
            )
            self._thread.start()
        return panel

    def wait(self) -> None:
        """Until what was begun is done."""
        if self._thread is not None:
            self._thread.join()

    def _is_free(self) -> bool:
        return (self._thread is None or not self._thread.is_alive()) and time.monotonic() >= self._rests_until

    def _make(
        self, version: str, alerts: Mapping[int, Alerts], moments: Mapping[int, Run], labels: Sequence[str]
    ) -> None:
        begun = time.monotonic()
        for place, moment in moments.items():
            if place not in self._made or self._made[place][0] != alerts[place]:
                self._made[place] = (alerts[place], moment, *_made(moment))
        entries = tuple((labels[place], *self._made[place][2:]) for place in alerts)
        self._panels[tuple(alerts)] = self._panel(version, list(alerts), entries, labels)
        ended = time.monotonic()
        self._rests_until = ended + REST * (ended - begun)

    def _panel(self, version: str, places: list[int], entries: Any, labels: Sequence[str]) -> Panel:
        made = {place: self._made[place] for place in places}
        diagnoses = {place: one for place, (_, _, one, _) in made.items() if one is not None}
        runs = {place: made[place][1] for place in diagnoses}
        runs = {place: run for place, run in runs.items() if len(run.steps) >= FEWEST_STEPS}
        pictures: dict[str, dict[str, Any] | None] = {}
        left_out: list[str] = []
        for name in FIGURES:
            try:
                pictures[name], _ = picture_of(name, runs, labels, left_out, diagnoses)
            except Exception as error:  # the page goes on, and says so
                pictures[name] = None
                left_out.append(f"{name}: {reason_of(error)}")
        return Panel(version, entries, pictures, tuple(dict.fromkeys(left_out)))


def _alerts_of(standing: Standing) -> Alerts:
    return tuple((alert.rule, alert.step) for alert in standing.alerts)


def _made(moment: Run) -> tuple[Diagnosis | None, str]:
    try:
        return diagnose(moment), ""
    except Exception as error:  # the page goes on, and says so
        return None, reason_of(error)


def words(panel: Panel) -> list[Any]:
    """The diagnoses in words, a part for each run."""
    from dash import html

    parts = []
    for label, made, problem in panel.entries:
        body = [html.P(f"Not diagnosed: {problem}")] if made is None else _of_diagnosis(made)
        parts.append(html.Article([html.H3(label), *body], className="diagnosis"))
    return parts


def _of_diagnosis(made: Diagnosis) -> list[Any]:
    from dash import html

    opening = [html.P(html.Strong(text)) for text in (what_rose(made), what_is_named(made)) if text]
    causes = html.Ol([_of_finding(finding) for finding in made.findings])
    more = [
        html.Details([html.Summary(title), html.Ul([html.Li(sentence) for sentence in sentences])])
        for title, sentences in (
            ("Where it is seen", made.where),
            ("Looked at, without a finding", made.ruled_out),
            ("Could not be asked", made.not_recorded),
        )
        if sentences
    ]
    return [*opening, causes, *more]


def _of_finding(finding: Finding) -> Any:
    from dash import html

    sentences = [*finding.evidence]
    if finding.remedy is not None:
        sentences.append(f"To do: {finding.remedy.text}")
    return html.Li([html.Strong(title_of(finding)), html.Ul([html.Li(sentence) for sentence in sentences])])
