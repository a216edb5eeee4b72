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
    looked_at = False
    for one, two in case.pairs:
        changes = case.changes(one, two)
        # What is stored in 16 bits has no share, and of what stands still the type is that of its beginning.
        shares = changes["bfloat16_share"].where(changes["is_same"] == 0).dropna("parameter")
        rounded = float((shares >= ALL).mean()) if len(shares) else 0.0
        looked_at = looked_at or len(shares) > 0
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
    if looked_at:
        case.ruled_out.append("the weights are not rounded to bfloat16")
