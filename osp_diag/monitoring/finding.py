"""What a rule finds in a run: when, where, how much, and a sentence."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["SEVERITIES", "Finding", "Severity"]

Severity = Literal["bad", "watch"]
SEVERITIES: tuple[Severity, ...] = ("bad", "watch")
"""Worst first: what follows can't be trusted; it may go wrong."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know.

    Attributes
    ----------
    rule : the name of its file in :mod:`osp_diag.monitoring.rules`
    severity : "bad": what follows can't be trusted; "watch": it may go wrong
    step : at which it is seen
    last_good_step, first_bad_step : the bracket in which it began; the last good one is None where there is
        none
    sentence : what is the matter, with the numbers
    value : the number that was judged
    statistic : its name: of a site, or of the run's series
    site, layer, channel : where, first in network order; None where that is unknown or has no meaning
    size : in units of the usual jump, where the rule has such a unit
    """

    rule: str
    severity: Severity
    step: int
    first_bad_step: int
    sentence: str
    value: float
    statistic: str
    last_good_step: int | None = None
    site: str | None = None
    layer: int | None = None
    channel: int | None = None
    size: float | None = None

    @property
    def rank(self) -> int:
        """Place of the severity in :data:`SEVERITIES`, 0 the worst."""
        return SEVERITIES.index(self.severity)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: those are texts."""
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
