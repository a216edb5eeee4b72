"""The grain of a share or a count: the step between two values that it can have."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

__all__ = ["counting_error", "grain"]

_ROUNDING = 1e-6
"""Of the largest value: two numbers that differ by less are the same in float32."""


def grain(values: Float[np.ndarray, "*values"]) -> float:
    """The largest number of which all ``values`` are whole multiples, by Euclid's algorithm.

    1/n of shares of n sequences, heads or neurons, and 1 of counts. Of a continuous quantity there is none,
    or one of the size of its rounding: 0. NaN, Inf and 0 are left out.
    """
    finite = np.abs(values[np.isfinite(values)])
    tolerance = _ROUNDING * finite.max(initial=0.0)
    common = 0.0
    for value in np.unique(finite[finite > tolerance]):
        common = _common_divisor(common, float(value), tolerance)
    return common if common > 2 * tolerance else 0.0


def _common_divisor(one: float, other: float, tolerance: float) -> float:
    while other > tolerance:
        # A remainder just below the divisor is a whole multiple, rounded down.
        left = one % other
        one, other = other, 0.0 if other - left <= tolerance else left
    return one


def counting_error(before: float, now: float, grain: float) -> float:
    """The standard error of ln(now / before) if both count independent units, k = value / grain of them.

    √(1/k₁ + 1/k₂), the delta method for two Poisson counts; of shares it is an upper bound. 0 where there is
    no grain.
    """
    return float(np.sqrt(grain / before + grain / now)) if grain else 0.0
