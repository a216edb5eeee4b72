"""What is taken of every step of a statistic, in a run that is opened as in one that is followed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Reduction"]


class Reduction(NamedTuple):
    """What is taken of each row (one step) of a statistic: some places, and means of what is finite."""

    dims: tuple[str, ...]
    """of the statistic, the step first"""
    places: tuple[tuple[str, int], ...] = ()
    """dimension → the place that is taken of it"""
    mean: tuple[str, ...] = ()
    """dimensions over which the mean is taken"""

    @property
    def result_dims(self) -> list[str]:
        """The dimensions of what comes out."""
        reduced = {*dict(self.places), *self.mean}
        return [dim for dim in self.dims if dim not in reduced]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        places = dict(self.places)
        rows = rows[tuple(places.get(dim, slice(None)) for dim in self.dims)].astype(np.float64)
        if not self.mean:
            return rows
        axes = tuple([dim for dim in self.dims if dim not in places].index(dim) for dim in self.mean)
        # The mean of what is finite; NaN where nothing is.
        finite = np.isfinite(rows)
        count = finite.sum(axis=axes)
        total = np.where(finite, rows, 0.0).sum(axis=axes)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)
