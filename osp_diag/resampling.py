"""Intervals of means over sequences by the bootstrap: sequences are drawn with replacement."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

__all__ = ["BOUNDS", "FEW_SEQUENCES", "draws", "interval", "ratio"]

BOUNDS = {"low": 0.025, "high": 0.975}
"""Quantiles of the resampled numbers between which the interval lies: 95%."""
FEW_SEQUENCES = 10
"""Fewer give percentiles that are too narrow, which a note says."""


def draws(sequences: int, resamples: int, seed: int) -> Int[np.ndarray, "draw sequence"]:
    """How often each sequence is taken: once each in the first row, at random in the others."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, sequences, (resamples, sequences))
    counts = [np.bincount(row, minlength=sequences) for row in chosen]
    return np.stack([np.ones(sequences, dtype=np.int64), *counts])


def ratio(
    totals: Float[np.ndarray, " sequence"],
    numbers: Float[np.ndarray, " sequence"],
    taken: Int[np.ndarray, "draw sequence"],
) -> Float[np.ndarray, " draw"]:
    """Σ totals / Σ numbers over the sequences of each draw: a mean over tokens."""
    return (taken @ totals) / (taken @ numbers)


def interval(values: np.ndarray) -> np.ndarray:
    """(bound, …) of the numbers (draw, …) of all draws but the first; NaN where any of them is."""
    if len(values) < 2:
        return np.full((len(BOUNDS), *values.shape[1:]), np.nan)
    return np.quantile(values[1:], list(BOUNDS.values()), axis=0)
