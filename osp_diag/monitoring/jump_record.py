"""How far every judged number went in one pause between probes, and when it first jumped."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from osp_diag.monitoring.places import Place

__all__ = ["JumpRecord"]


@dataclass
class JumpRecord:
    """By judged number, in the order in which they came.

    Attributes
    ----------
    places : where each belongs
    step : of its first jump; NaN where it never jumped
    size : of its first jump, or else of its largest change so far, in units of the usual largest change; NaN
        where too few changes were known to say what is usual
    """

    places: list[Place] = field(default_factory=list)
    step: Float[np.ndarray, " number"] = field(default_factory=lambda: np.empty(0))
    size: Float[np.ndarray, " number"] = field(default_factory=lambda: np.empty(0))

    def add(
        self,
        places: list[Place],
        step: int,
        size: Float[np.ndarray, " number"],
        jumped: Bool[np.ndarray, " number"],
    ) -> None:
        """The changes up to a probe; ``places`` may have grown at its end."""
        self.places = places
        new = (0, len(places) - len(self.step))
        self.step = np.pad(self.step, new, constant_values=np.nan)
        self.size = np.pad(self.size, new, constant_values=np.nan)
        before = np.isnan(self.step)
        first = jumped & before
        self.size = np.where(first, size, np.where(before, np.fmax(self.size, size), self.size))
        self.step[first] = step
