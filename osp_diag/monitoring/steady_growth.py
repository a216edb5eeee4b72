"""How fast numbers grow over the last probes, how steadily, and when they reach a limit."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

__all__ = ["Crossing", "crossing", "growth", "share_rising"]

_QUANTILE_95 = 1.645


def growth(values: Float[np.ndarray, " probe"]) -> float:
    """exp of the median slope of ln y between any two probes, times the probes between first and last.

    The Theil–Sen line: one odd probe does not turn it. NaN with fewer than two values above 0.
    """
    places = np.flatnonzero(np.isfinite(values) & (values > 0))
    if len(places) < 2:
        return float("nan")
    y = np.log(values[places])
    first, second = np.triu_indices(len(places), 1)
    slope = np.median((y[second] - y[first]) / (places[second] - places[first]))
    return float(np.exp(slope * (len(values) - 1)))


def share_rising(values: Float[np.ndarray, " probe"]) -> float:
    """Share of the pairs of probes of which the later is the higher; pairs with NaN are none."""
    first, second = np.triu_indices(len(values), 1)
    return float((values[second] > values[first]).mean()) if len(first) else 0.0


class Crossing(NamedTuple):
    """The step at which an exponential reaches a limit, and a 90% interval; ``latest`` may be infinite."""

    step: float
    earliest: float
    latest: float


def crossing(
    steps: Float[np.ndarray, " probe"], values: Float[np.ndarray, " probe"], limit: float
) -> Crossing | None:
    """Where ln y = a + b·step reaches ln ``limit``, with b the Theil–Sen slope; None where b is not above 0.

    a is the median of ln y − b·step over the last three probes, so that a curve that bends is carried on from
    its end. The interval takes b from the slopes of the pairs at the ranks of Sen's 90%
    interval, (N ± 1.645 · √(n(n−1)(2n+5)/18)) / 2 of N = n(n−1)/2.

    References
    ----------
    Sen 1968, Estimates of the regression coefficient based on Kendall's tau;
    doi:10.1080/01621459.1968.10480934
    """
    y, count = np.log(values), len(values)
    first, second = np.triu_indices(count, 1)
    slopes = np.sort((y[second] - y[first]) / (steps[second] - steps[first]))
    half = _QUANTILE_95 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18) / 2
    low = slopes[max(0, math.floor(len(slopes) / 2 - half))]
    high = slopes[min(len(slopes) - 1, math.ceil(len(slopes) / 2 + half))]
    middle = float(np.median(slopes))
    if middle <= 0:
        return None
    centre = float(steps[-1])
    ends = []
    for slope in (middle, high, low):
        level = float(np.median((y - slope * (steps - centre))[-3:]))
        ends.append(centre + (math.log(limit) - level) / slope if slope > 0 else math.inf)
    return Crossing(ends[0], min(ends[0], ends[1]), max(ends[0], ends[2]))
