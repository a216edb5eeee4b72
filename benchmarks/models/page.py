"""docs/models.md, from the rows that were measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.models.cases import KINDS

__all__ = ["AGREES", "PAGE", "RESULTS", "errors", "headline", "page", "read_results", "summary"]

RESULTS = Path(__file__).with_name("results.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
AGREES = 1e-4
"""An error up to which two numbers are called the same."""

Results = Mapping[str, dict[str, Any]]

PREAMBLE = """# What opens

Written by `python -m benchmarks.models`, from what it measured; edit that, not this file.

{summary}

Each row is a tiny model with random weights, built from its configuration alone, so nothing is downloaded. It
is probed in one forward pass of two sequences (in most tables one of them is padded), and compared with a
dense float64 pass of its own, under eager attention, in which osp_diag takes no part:

- *Sites* is how many of the {number} named ones were found; what is absent, and why, stands below the table.
- *Kurtosis* is the largest error of `osp_excess_kurtosis`, `fisher_kurtosis` and `absolute_maximum` over the
  hidden states that the model returns (relative where a number exceeds 1).
- *Attention* is the largest error of `first_token_attention`, `key_mass` and `sink_rate` over all heads, from
  the T×T weights that the model returns, or that its own softmax gives.
- *Same output*: whether the probed pass, and one after it, returned the same bits as one without a probe.

A dash is a number that could not be compared; the note says why.
"""


def read_results() -> dict[str, dict[str, Any]]:
    """Name → row; of rows that were measured twice the later."""
    if not RESULTS.exists():
        return {}
    rows = (json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines())
    return {row["name"]: row for row in rows}


def page(results: Results) -> str:
    """The whole file."""
    chapters = [PREAMBLE.format(summary=summary(results), number=len(_named_sites(results)))]
    for kind in KINDS:
        rows = [row for row in results.values() if row["kind"] == kind]
        if rows:
            chapters.append(_chapter(kind, rows))
    return "\n".join(chapters).rstrip() + "\n"


def headline(results: Results) -> str:
    """The table in one sentence, which README has."""
    measured, compared, agree = _measured(results)
    same = sum(row["bit_identical"] for row in measured)
    unchanged = "all" if same == len(measured) else f"{same}"
    return (
        f"Of [{len(results)} tiny models](docs/models.md) (text, vision, audio, adapted, written by hand), "
        f"{len(measured)} are measured; {len(agree)} of the {len(compared)} that could be compared agree "
        f"with a dense float64 pass to {AGREES:g}, and the outputs of {unchanged} stay bit-identical."
    )


def summary(results: Results) -> str:
    """What the table says, in a paragraph."""
    measured, compared, agree = _measured(results)
    states = [row["state"] for row in results.values()]
    same = sum(row["bit_identical"] for row in measured)
    attention = sum(row["attention_error"] is not None for row in compared)
    return (
        f"Of {len(results)} models, {len(measured)} are measured: {len(agree)} of the {len(compared)} that "
        f"could be compared ({attention} with attention) agree with a dense float64 pass to {AGREES:g}, "
        f"and {same} return the same bits as without a probe. Refused with a reason: "
        f"{states.count('refused')}; raising: {states.count('raised')}; not built: "
        f"{states.count('not built')}. Some architectures share their code, and so their numbers."
    )


def _named_sites(results: Results) -> set[str]:
    """The sites that were looked for when this was measured: later ones are in no row."""
    return {site for row in results.values() for site in (*row["sites"], *row["absent"])}


def _measured(results: Results) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows that were measured, those of them that were compared, and those of them that agree."""
    measured = [row for row in results.values() if row["state"] == "measured"]
    compared = [row for row in measured if errors(row)]
    return measured, compared, [row for row in compared if max(errors(row)) <= AGREES]


def errors(row: Mapping[str, Any]) -> list[float]:
    """Of a row, those that could be computed."""
    return [row[name] for name in ("kurtosis_error", "attention_error") if row[name] is not None]


def _chapter(kind: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"## {kind.capitalize()}", "", "| model | sites | kurtosis | attention | same output | note |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [_line(row) for row in rows if row["state"] != "not built"]
    without = [
        f"- {row['name']}: {_cell(_missing(row['absent']))}"
        for row in rows
        if row["state"] == "measured" and row["absent"]
    ]
    if without:
        lines += ["", "Sites that are absent:", "", *without]
    absent_models = [
        f"- {row['name']}: {_cell(row['reason'])}" for row in rows if row["state"] == "not built"
    ]
    if absent_models:
        lines += ["", "Not built:", "", *absent_models]
    return "\n".join([*lines, ""])


def _line(row: Mapping[str, Any]) -> str:
    name = f"`{row['model']}`" if row["model"] else ""
    title = f"{row['name'].partition(' (')[0]} {name}".strip() if "peft" not in row["name"] else row["name"]
    if row["state"] != "measured":
        return f"| {title} | – | – | – | – | **{row['state']}**: {_cell(row['reason'])} |"
    same = "yes" if row["bit_identical"] else "**no**"
    cells = [
        title,
        str(len(row["sites"])),
        _error(row["kurtosis_error"]),
        _error(row["attention_error"]),
        same,
    ]
    notes = list(dict.fromkeys(row["notes"]))
    if row["attention_layers"] and row["attention_layers_compared"] < row["attention_layers"]:
        notes.append(
            f"attention of {row['attention_layers_compared']} of {row['attention_layers']} layers compared"
        )
    elif not row["attention_layers"] and "attention" in row["sites"]:
        notes.append("attention was found, and not measured in this pass")
    return f"| {' | '.join(cells)} | {_cell('; '.join(notes))} |"


def _error(error: float | None) -> str:
    if error is None:
        return "–"
    return _number(error) if error <= AGREES else f"**wrong by {_number(error)}**"


def _number(value: float) -> str:
    if value == float("inf"):
        return "another shape or NaN"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+") if value < 0.01 else f"{value:.2g}"


def _missing(absent: Mapping[str, str]) -> str:
    """Sites by their reason."""
    by_reason: dict[str, list[str]] = {}
    for site, reason in absent.items():
        by_reason.setdefault(reason, []).append(f"`{site}`")
    return "; ".join(f"{_enumerate(sites)} ({reason})" for reason, sites in by_reason.items())


def _enumerate(words: Iterable[str]) -> str:
    return ", ".join(words)


def _cell(text: str) -> str:
    """A bar would end the table's cell, and angle brackets would be taken for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")
