"""Making data fit a picture: maps without losing a single spike, labels without overlap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from osp_diag.max_pooling import bin_starts, max_pool

__all__ = ["bin_centres", "bin_starts", "counts_few", "max_pool", "spans", "spread"]


def bin_centres(size: int, bins: int) -> Float[np.ndarray, " bin"]:
    """Where the bins of ``max_pool`` have their middles on an axis on which an entry stands at its index."""
    return (np.arange(bins) + 0.5) * size / bins - 0.5


def spans(size: int, bins: int) -> list[str] | None:
    """What each bin of ``max_pool`` holds of ``range(size)``: "16 to 17". None where nothing was pooled."""
    if size <= bins:
        return None
    starts = [int(start) for start in bin_starts(size, bins)]
    ends = [*(start - 1 for start in starts[1:]), size - 1]
    return [f"{a} to {b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True)]


def spread(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels: as near to ``targets`` as they can be, ``gap`` apart, inside [low, high].

    The order of ``targets`` is kept. If they cannot all fit, they are set evenly over the interval.
    """
    order = np.argsort(targets, kind="stable")
    count = len(order)
    if not count:
        return []
    if gap * (count - 1) >= high - low:
        even = np.linspace(low, high, count)
        return [float(even[rank]) for rank in np.argsort(order, kind="stable")]
    places = np.clip(np.asarray(targets, dtype=float)[order], low, high)
    # Neighbours that overlap push each other apart, by half the overlap each.
    for _ in range(200):
        overlap = gap - np.diff(places)
        if not (overlap > 1e-9).any():
            break
        push = np.maximum(overlap, 0) / 2
        places[:-1] -= push
        places[1:] += push
        places = np.clip(places, low, high)
    # What is left of an overlap: one sweep up for the gap, one down so that all stay below ``high``.
    for i in range(1, count):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(count - 1, -1, -1):
        places[i] = min(places[i], high - gap * (count - 1 - i))
    return [float(places[rank]) for rank in np.argsort(order, kind="stable")]


def counts_few(places: Float[np.ndarray, " place"]) -> bool:
    """Whether these are a few whole numbers, such as layers, between which an axis needs no ticks."""
    finite = places[np.isfinite(places)]
    return bool(finite.size) and bool((finite == np.round(finite)).all()) and float(np.ptp(finite)) <= 10
