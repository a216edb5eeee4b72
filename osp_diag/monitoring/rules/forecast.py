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
    """The line of ln y over the last probes reaches the limit before the training ends.

    Where its end is unknown: within as many steps as were made. Told once a limit, of the place that gets there
    first.
    """

    limits: tuple[Limit, ...] = LIMITS
    rising: float = 0.9
    """Share of the pairs of these probes of which the later is the higher."""
    _foretold: set[Limit] = field(default_factory=set)

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        table = moment.table
        if len(table.steps) < WINDOW:
            return
        steps, rows = np.array(table.steps, float), table.recent()
        horizon = moment.planned if moment.planned is not None else 2 * moment.step
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
                if not (values > 0).all() or share_rising(values) < self.rising:
                    continue
                when = crossing(steps, values, limit.value)
                if when is not None and when.step <= horizon:
                    crossings.append((when, column))
            if crossings:
                self._foretold.add(limit)
                when, column = min(crossings)
                yield self._finding(moment, limit, when, column)

    def _finding(self, moment: Moment, limit: Limit, when: Crossing, column: int) -> Finding:
        place, now = moment.table.places[column], float(moment.values[column])
        latest = f"{when.latest:,.0f}" if np.isfinite(when.latest) else "never"
        return Finding(
            rule="forecast",
            severity="watch",
            step=moment.step,
            last_good_step=moment.step,
            first_bad_step=round(when.step),
            site=place.site,
            layer=place.layer,
            statistic=place.statistic,
            value=now,
            sentence=(
                f"{place.statistic} at {place.words}, {now:,.4g} at step {moment.step:,}, grows steadily and will pass "
                f"{limit.value:,.0f}, {limit.meaning}, at about step {when.step:,.0f} (90% interval "
                f"{max(when.earliest, moment.step):,.0f} to {latest})"
            ),
        )
