"""Which parameters stood still: of loops that do not record which optimizer moves what."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding, Place
from osp_diag.wording import listed

__all__ = ["standing_parameters"]

MOST = 0.5
"""Share of the parameters that may stand still where it says something of them and not of the training."""


def standing_parameters(case: Case) -> Iterator[Finding]:
    """Parameters that are the same to the bit from some checkpoint on, or up to one, while others move."""
    if case.laboratory is None or case.trains or not case.pairs:
        return
    moved_before: set[str] | None = None
    stood = set[str]()
    always: set[str] | None = None
    for one, two in case.pairs:
        table = case.changes(one, two)
        same = table["is_same"].values.astype(bool)
        names = table["parameter"].values.astype(str)
        if not len(names) or same.mean() > MOST:
            continue
        # In 16 bits a weight stands still where a step is less than its rounding.
        is_wide = np.isfinite(table["bfloat16_share"].values)
        still, moves = set(names[same]), set(names[~same])
        always = still if always is None else always & still
        for now, word in ((still & set(names[is_wide]), "stand"), (moves, "move")):
            other = moved_before if word == "stand" else stood
            changed = [name for name in names if other and name in now and name in other]
            if changed:
                yield _finding(changed, word, Bracket(one.step, two.step))
        moved_before, stood = moves, still & set(names[is_wide])
    if always:
        case.ruled_out.append(f"parameters that no step moves: {listed(sorted(always), 4)}")


def _finding(names: list[str], word: str, bracket: Bracket) -> Finding:
    count = f"{len(names)} parameters" if len(names) > 1 else names[0]
    verb = word if len(names) > 1 else f"{word}s"
    how = "still" if word == "stand" else "that stood still before"
    text = (
        f"between the checkpoints of steps {bracket.good} and {bracket.bad} the others move as before: "
        f"{listed(names, 4)}"
    )
    return Finding(
        "optimizer_routing", f"{count} {verb} {how}", "proved", bracket, (text,), Place(tuple(names))
    )
