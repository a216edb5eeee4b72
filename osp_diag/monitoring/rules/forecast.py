"""A number that grows steadily towards a limit, and when it will pass it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.limits import LIMITS, Limit
from osp_diag.monitoring.moment import WINDOW, Moment
from osp_diag.monitoring.rule import RunningRule
from osp_diag.monitoring.steady_growth import Crossing, crossing, share_rising


@dataclass
class Rule(RunningRule):
    """The line of ln y over the last probes reaches the limit within half as many steps as these probes span.

    No farther, since no growth goes on as it is for long: the step from random weights is no part of it, the later
    half has to grow as fast as the earlier, the limit is near, and a straight line through the last probes
    reaches it in that time as well; that line is the late end of the range. Told once a limit, of the place
    that gets there first.
    """

    limits: tuple[Limit, ...] = LIMITS
    rising: float = 0.9
    """Share of the pairs of these probes of which the later is the higher."""
    nearness: float = 0.5
    """Share of the limit that the number has reached. Of forecasts from afar none came true (docs/log.md)."""
    bend: float = 1.0
    """The later half's growth of ln y, as a share of the earlier half's, is at least this."""
    _foretold: set[Limit] = field(default_factory=set)

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        table = moment.table
        if len(table.steps) < WINDOW or table.steps[0] == 0:
            return
        steps, rows = np.array(table.steps, float), table.recent()
        horizon = steps[-1] + (steps[-1] - steps[0]) / 2
        if moment.planned is not None:
            horizon = min(horizon, moment.planned)
        for limit in self.limits:
            if limit in self._foretold:
                continue
            columns = [i for i, place in enumerate(table.places) if place.statistic == limit.statistic]
            if np.nanmax(rows[:, columns], initial=0.0) > limit.value:
                self._foretold.add(limit)  # it is passed already, which another rule says
                continue
            crossings: list[tuple[Crossing, int]] = []
            for column in columns:
                values = rows[:, column]
                if not self._grows(values) or values[-1] < self.nearness * limit.value:
                    continue
                when = crossing(steps, values, limit.value)
                slope = _slope(steps, values)
                straight = steps[-1] + (limit.value - values[-1]) / slope if slope > 0 else np.inf
                if when is not None and max(when.step, straight) <= horizon:
                    crossings.append((Crossing(when.step, when.earliest, max(when.latest, straight)), column))
            if crossings:
                self._foretold.add(limit)
                when, column = min(crossings)
                yield self._finding(moment, limit, when, column)

    def _grows(self, values: np.ndarray) -> bool:
        if not (values > 0).all() or share_rising(values) < self.rising:
            return False
        half = WINDOW // 2
        earlier, later = np.log(values[half] / values[0]), np.log(values[-1] / values[half])
        return bool(later * half >= self.bend * earlier * (WINDOW - 1 - half))

    def _finding(self, moment: Moment, limit: Limit, when: Crossing, column: int) -> Finding:
        place, now = moment.table.places[column], float(moment.values[column])
        latest = f"{when.latest:,.0f}" if np.isfinite(when.latest) else "never"
        return Finding(
            rule="forecast",
            severity="watch",
            step=moment.step,
            last_good_step=moment.step,
            first_bad_step=max(moment.step + 1, round(when.step)),
            site=place.site,
            layer=place.layer,
            statistic=place.statistic,
            value=now,
            sentence=(
                f"{place.statistic} at {place.words}, {now:,.4g} at step {moment.step:,}, grows steadily; if it goes on so, it passes "
                f"{limit.value:,.0f}, {limit.meaning}, at about step {max(when.step, moment.step + 1):,.0f} (range "
                f"{max(when.earliest, moment.step + 1):,.0f} to {latest})"
            ),
        )


def _slope(steps: np.ndarray, values: np.ndarray) -> float:
    """The median slope of the pairs of probes of the later half."""
    steps, values = steps[-WINDOW // 2 :], values[-WINDOW // 2 :]
    first, second = np.triu_indices(len(steps), 1)
    return float(np.median((values[second] - values[first]) / (steps[second] - steps[first])))
