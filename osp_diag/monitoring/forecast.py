"""When a number that grows steadily would reach a limit if it went on so; on request, and never an alert."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from osp_diag.monitoring.limits import LIMITS, Limit
from osp_diag.monitoring.moment import WINDOW, Table
from osp_diag.monitoring.places import Place, numbers_of
from osp_diag.monitoring.reading import probes_between
from osp_diag.monitoring.steady_growth import Crossing, crossing, share_rising
from osp_diag.runs.run import Run

__all__ = ["Forecast", "forecasts"]

NEARNESS = 0.5
"""Share of the limit that the number has reached."""
RISING = 0.9
"""Share of the pairs of the last probes of which the later is the higher."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """An extrapolation: where steady growth leads if it goes on.

    Attributes
    ----------
    statistic, site, layer : of the number that gets there first
    step, value : the last probe, and the number there
    limit, meaning : what it would pass
    at_step, earliest, latest : where the line through the last probes gets there; the range of the line's
        slope, not of what may happen; ``latest`` None: perhaps never
    """

    statistic: str
    site: str | None
    layer: int | None
    step: int
    value: float
    limit: float
    meaning: str
    at_step: int
    earliest: int
    latest: int | None

    @property
    def sentence(self) -> str:
        """For people."""
        name = Place(self.site, self.layer, self.statistic).full_name
        latest = "never" if self.latest is None else f"{self.latest:,}"
        return (
            f"{name}, {self.value:,.4g} at step {self.step:,}, would pass "
            f"{self.limit:,.0f}, {self.meaning}, at about step {self.at_step:,} ({self.earliest:,} to "
            f"{latest}) if the growth of the last {WINDOW} probes went on: an extrapolation, none was seen "
            "to come true"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"sentence": self.sentence}


def forecasts(run: Run) -> tuple[Forecast, ...]:
    """What the last probes of a run lead to, of each limit that is not passed yet at most one.

    The line of ln y over the last ten probes reaches the limit within half as many steps as these probes
    span. No farther, since no growth goes on as it is for long: the step from random weights is no part of
    it, the later half has to grow as fast as the earlier, the limit is near, and a straight line through the
    last probes reaches it in that time as well; that line is the late end of the range. Measured on healthy
    trainings it was false where it spoke (docs/log.md), so it is given on request alone.
    """
    stop = len(run.steps)
    start = stop - WINDOW
    if start < 0 or run.steps[start] == 0:
        return ()
    table = Table()
    for place, blocks in probes_between(run, start, stop):
        table.add(int(run.steps[place]), *numbers_of(blocks))
    config = run.attrs.get("config")
    planned = config.get("steps") if isinstance(config, dict) else None
    last = table.steps[-1] + (table.steps[-1] - table.steps[0]) / 2
    if isinstance(planned, int):
        last = min(last, planned)
    of_limits = (_first_to_pass(table, limit, last) for limit in LIMITS)
    return tuple(one for one in of_limits if one is not None)


def _first_to_pass(table: Table, limit: Limit, last: float) -> Forecast | None:
    steps, rows = np.array(table.steps, float), table.recent()
    columns = table.columns_of(limit.statistic)
    if np.nanmax(rows[:, columns], initial=0.0) > limit.value:
        return None  # it is passed already, which a rule says
    crossings: list[tuple[Crossing, int]] = []
    for column in columns:
        values = rows[:, column]
        if not _grows(values) or values[-1] < NEARNESS * limit.value:
            continue
        when, slope = crossing(steps, values, limit.value), _slope(steps, values)
        straight = steps[-1] + (limit.value - values[-1]) / slope if slope > 0 else np.inf
        if when is not None and max(when.step, straight) <= last:
            crossings.append((Crossing(when.step, when.earliest, max(when.latest, straight)), column))
    if not crossings:
        return None
    when, column = min(crossings)
    place, soonest = table.places[column], table.steps[-1] + 1
    return Forecast(
        statistic=place.statistic,
        site=place.site,
        layer=place.layer,
        step=table.steps[-1],
        value=float(rows[-1, column]),
        limit=limit.value,
        meaning=limit.meaning,
        at_step=max(soonest, round(when.step)),
        earliest=max(soonest, round(when.earliest)),
        latest=max(soonest, round(when.latest)) if np.isfinite(when.latest) else None,
    )


def _grows(values: np.ndarray) -> bool:
    if not (values > 0).all() or share_rising(values) < RISING:
        return False
    half = WINDOW // 2
    earlier, later = np.log(values[half] / values[0]), np.log(values[-1] / values[half])
    # Of a pure exponential both sides are equal, up to rounding.
    return bool(later * half >= earlier * (WINDOW - 1 - half) * (1 - 1e-6))


def _slope(steps: np.ndarray, values: np.ndarray) -> float:
    """The median slope of the pairs of probes of the later half."""
    steps, values = steps[-WINDOW // 2 :], values[-WINDOW // 2 :]
    first, second = np.triu_indices(len(steps), 1)
    return float(np.median((values[second] - values[first]) / (steps[second] - steps[first])))
