"""The scores as tables: by group, by family, and by fault."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.planted_faults.faults import COMPOUND, FAULTS, HEALTHY
from benchmarks.planted_faults.scoring import OUTCOMES, RAISED
from osp_diag.analyses.diagnosis.findings import FAMILIES
from osp_diag.monitoring.limits import LOSS_RISE

__all__ = ["confusion", "page", "read_scores"]

Score = Mapping[str, Any]

TEMPLATE = """Written by `python -m benchmarks.planted_faults score`.

{count} trainings with a fault and {healthy} without; of each, what the monitor said while it ran and what
the diagnosis named first. *Raised*: the largest kurtosis after the onset is more than {raised:g} times that
of the healthy training of the same seed. *Noticed*: an alert after the onset, with the median of steps until
then. *When* (the onset is within the bracket), *family*, *place* (parameter, or site and layer),
*index* (row, channel or head) and *cause*: named rightly, of those that have one. *Remedy*: the diagnosis
tried it, and says that it helps; *heals*: it led back to the kurtosis (up to × {raised:g}) and the held-out
loss (up to {rise:g} nats) of the healthy training. *Question 7*: short trainings with a part of the recipe
put back name a right part first, by themselves, where kurtosis is raised and a part is missing. *Wrong*:
families named that the fault has not.

{groups}

{healthy_table}

{confusion}

{faults}
"""
GROUP_COLUMNS = (
    "trainings",
    "noticed",
    "steps",
    "named",
    "family",
    "when",
    "place",
    "index",
    "cause",
    "remedy",
    "heals",
    "question 7",
    "wrong",
)


def read_scores(out: Path) -> list[dict[str, Any]]:
    """Of all presets, in the order of the table of faults."""
    scores = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*/*.score.json")]
    order = {name: number for number, name in enumerate(FAULTS)}
    known = [score for score in scores if score["fault"] in order]
    return sorted(known, key=lambda score: (order[score["fault"]], score["preset"], score["seed"]))


def page(scores: Sequence[Score]) -> str:
    """All tables."""
    faulty = [score for score in scores if score["family"] != HEALTHY]
    healthy = [score for score in scores if score["family"] == HEALTHY]
    return TEMPLATE.format(
        count=len(faulty),
        healthy=len(healthy),
        raised=RAISED,
        rise=LOSS_RISE,
        groups=_groups(faulty),
        healthy_table=_healthy(healthy),
        confusion=_confusion_table(scores),
        faults=_faults(faulty),
    )


def _groups(scores: Sequence[Score]) -> str:
    rows = []
    for group in sorted({score["group"] for score in scores}):
        for raised in (True, False):
            members = [s for s in scores if s["group"] == group and s["raised"] == raised]
            if members:
                rows.append([group, "raised" if raised else "not raised", *_counts(members)])
    return _table(["group", "kurtosis", *GROUP_COLUMNS], rows)


def _counts(scores: Sequence[Score]) -> list[str]:
    asked = [score for score in scores if "named" in score]
    noticed = [score["noticed_after"] for score in scores if score["noticed_after"] is not None]
    return [
        str(len(scores)),
        _of(len(noticed), len(scores)),
        f"{statistics.median(noticed):g}" if noticed else "–",
        _of(sum(bool(score["named"]) for score in asked), len(asked)),
        *(_share(asked, key) for key in OUTCOMES),
        _of(sum(bool(score["wrong_families"]) for score in asked), len(asked)),
    ]


def _healthy(scores: Sequence[Score]) -> str:
    rows = []
    for name, members in _by(scores, lambda score: f"{score['fault']}, {score['preset']}"):
        asked = [score for score in members if "named" in score]
        named = sorted({family for score in asked for family in score["named"]})
        rows.append(
            [
                name,
                str(len(members)),
                _of(sum(score["false_alerts"] > 0 for score in members), len(members)),
                _of(sum(bool(score["named"]) for score in asked), len(asked)),
                ", ".join(named) or "–",
            ]
        )
    return _table(["without a fault", "trainings", "false alerts", "false findings", "which"], rows)


def confusion(scores: Iterable[Score]) -> dict[str, dict[str, int]]:
    """Planted family → family named first (``nothing`` where none was) → trainings."""
    counts: dict[str, dict[str, int]] = {}
    for score in scores:
        if "named" in score:
            row = counts.setdefault(score["family"], {})
            named = score["named"][0] if score["named"] else "nothing"
            row[named] = row.get(named, 0) + 1
    return counts


def _confusion_table(scores: Iterable[Score]) -> str:
    counts = confusion(scores)
    others = {named for row in counts.values() for named in row} - set(FAMILIES) - {"nothing"}
    columns = [name for name in FAMILIES if any(name in row for row in counts.values())]
    columns += [*sorted(others), "nothing"]
    rows = [
        [family, *(str(counts[family].get(name, "")) for name in columns)]
        for family in (*FAMILIES, COMPOUND, HEALTHY)
        if family in counts
    ]
    return _table(["planted ↓, named first →", *columns], rows)


def _faults(scores: Sequence[Score]) -> str:
    rows = []
    for name, members in _by(scores, lambda score: score["fault"]):
        fault = FAULTS[name]
        asked = [score for score in members if "named" in score]
        ratios = [s["kurtosis"] / s["healthy_kurtosis"] for s in members if s["kurtosis"] is not None]
        rows.append(
            [
                name,
                "; ".join(cause.text for cause in fault.causes),
                "declared" if fault.is_declared else "silent",
                f"{statistics.median(ratios):.2g}" if ratios else "–",
                _of(sum(s["noticed_after"] is not None for s in members), len(members)),
                *(_share(asked, key) for key in ("family_right", "place_right", "cause_right")),
                ", ".join(sorted({family for s in asked for family in s["wrong_families"]})) or "–",
            ]
        )
    header = ["fault", "cause", "", "kurtosis ×", "noticed", "family", "place", "cause named", "wrong"]
    return _table(header, rows)


def _by(scores: Iterable[Score], key: Callable[[Score], str]) -> Iterable[tuple[str, list[Score]]]:
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(key(score), []).append(score)
    return groups.items()


def _share(scores: Iterable[Score], key: str) -> str:
    """How many have it right, of those to which it applies."""
    values = [score[key] for score in scores if score.get(key) is not None]
    return _of(sum(values), len(values))


def _of(part: int, whole: int) -> str:
    return f"{part}/{whole}" if whole else "–"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in lines)
