"""Making large maps small without losing a single spike."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

__all__ = ["bin_starts", "max_pool"]


def bin_starts(size: int, bins: int) -> Int[np.ndarray, " bin"]:
    """First index of each of at most ``bins`` nearly equal runs of ``range(size)``."""
    count = max(1, min(size, bins))
    return np.floor(np.arange(count) * size / count).astype(np.int64)


def max_pool(values: Float[np.ndarray, "..."], axis: int, bins: int) -> Float[np.ndarray, "..."]:
    """The largest value of each bin along ``axis``; unchanged where it is no longer than ``bins``.

    A mean would shrink a spike of one channel by the width of its bin; a stride would miss it. NaN
    survives only where a whole bin is NaN.
    """
    size = values.shape[axis]
    if size <= bins:
        return values
    return np.fmax.reduceat(values, bin_starts(size, bins), axis=axis)
