"""What an edit puts back, in words."""

from __future__ import annotations

from collections.abc import Sequence

from osp_diag.laboratory import WeightPart

__all__ = ["words_of"]


def words_of(part: WeightPart, dimensions: int, before: int) -> str:
    """``row 7 of down_proj.weight as at step 8``; entries of a vector are channels."""
    kind = "channel" if dimensions < 2 else part.axis
    many = "s" if len(part.indices) > 1 else ""
    rows = "all" if part.axis == "all" else f"{kind}{many} {_brief(part.indices)}"
    return f"{rows} of {part.parameter} as at step {before}"


def _brief(indices: Sequence[int]) -> str:
    if len(indices) > 3 and indices[-1] - indices[0] == len(indices) - 1:
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices[:6])) + (" …" if len(indices) > 6 else "")
