"""A number beyond a limit: logits that QK-Clip would clip, activations beyond the range of fp8 or fp16."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.limits import LIMITS, Limit
from osp_diag.monitoring.moment import Moment
from osp_diag.monitoring.rule import RunningRule


@dataclass
class Rule(RunningRule):
    """The first probe at which any site and layer is above a limit; told once a limit."""

    limits: tuple[Limit, ...] = LIMITS
    _passed: set[Limit] = field(default_factory=set)

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        values = moment.values
        for limit in self.limits:
            if limit in self._passed:
                continue
            above = [c for c in moment.table.columns_of(limit.statistic) if values[c] > limit.value]
            if not above:
                continue
            self._passed.add(limit)
            column = moment.first(above)
            place = moment.table.places[column]
            yield moment.finding(
                column,
                rule="limit",
                severity=limit.severity,
                last_good_step=moment.previous,
                sentence=(
                    f"{place.full_name} is {values[column]:,.4g} at step {moment.step:,}, "
                    f"above {limit.value:,.0f}, {limit.meaning}"
                ),
            )
