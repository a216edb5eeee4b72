"""Floors and ceilings of statistics: what noise scores and the largest that is possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from osp_diag.figures.backend import Panel
from osp_diag.wording import number

__all__ = ["bound", "draw_bounds", "log_range"]


def bound(attrs: Mapping[Any, Any], name: str) -> float:
    """``floor`` or ``ceiling`` of a statistic; NaN where its estimator has none."""
    try:
        return float(attrs.get(name))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return float("nan")


def log_range(
    values: np.ndarray, floors: np.ndarray, ceilings: np.ndarray
) -> tuple[float, float] | tuple[None, None]:
    """Ends of a logarithmic axis with room for floor, ceiling and their labels; None without positive values.

    The OSP formula is 0 for tokens below a Gaussian's kurtosis: such values are drawn at the foot.
    """
    positive = [part[part > 0] for part in map(np.ravel, (floors, ceilings, values))]
    if not any(part.size for part in positive):
        return None, None
    foot = positive[0].min() / 3 if positive[0].size else min(p.min() for p in positive if p.size) / 1.6
    return float(foot), float(max(part.max() for part in positive if part.size) * 3)


def draw_bounds(
    panel: Panel, floors: Iterable[float], ceilings: Iterable[float], *, floor: str = "floor"
) -> None:
    """Both as lines, one for each width that the runs have; ``floor`` is what the lower one is called."""
    for values, label in ((floors, floor), (ceilings, "ceiling")):
        for value in sorted({float(value) for value in values if np.isfinite(value)}):
            panel.level(value, f"{label} {number(value)}")
