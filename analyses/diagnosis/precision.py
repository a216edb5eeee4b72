"""Are the weights numbers of a narrower type than they were?"""

from __future__ import annotations

from collections.abc import Iterator

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding

__all__ = ["narrower_weights"]

ALL, SOME = 0.999, 0.9
"""Share of bfloat16 numbers among the entries: of rounded weights all, of float32 weights 1 in 65,536."""


def narrower_weights(case: Case) -> Iterator[Finding]:
    """Weights that became bfloat16 numbers between two checkpoints, or always were."""
    before: int | None = None
    for one, two in case.pairs:
        shares = case.changes(one, two)["bfloat16_share"]
        rounded = float((shares >= ALL).mean()) if len(shares) else 0.0
        if one is case.checkpoints[0]:
            before = one.step
        if rounded > SOME:
            yield Finding(
                "precision",
                "weights are rounded to bfloat16",
                "proved",
                Bracket(before, two.step),
                (f"{rounded:.0%} of the parameters hold bfloat16 numbers alone at step {two.step}",),
            )
            return
        before = two.step
    if case.pairs:
        case.ruled_out.append("the weights are not rounded to bfloat16")
