"""OSP kurtosis that is high and grows steadily, in the residual stream or beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from osp_diag.errors import UsageError
from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.moment import TIMES_HIGH, WINDOW, Moment
from osp_diag.monitoring.rule import RunningRule
from osp_diag.monitoring.steady_growth import growth, share_rising
from osp_diag.schema import KURTOSIS, RESIDUAL_SITES
from osp_diag.wording import counted

SITES = (
    *RESIDUAL_SITES, "attention_input", "attention_contribution", "mixer_input", "mixer_contribution",
    "mlp_input", "mlp_contribution", "final_norm",
)  # fmt: skip
"""Not ``mlp_hidden`` and the heads' own states: products have heavy tails in healthy trainings as well."""


@dataclass
class Rule(RunningRule):
    """In the residual stream, in what reads it and what is written to it; said whenever it begins."""

    times_floor: float = TIMES_HIGH
    """Kurtosis counts as high from this multiple of what Gaussian noise of that width scores."""
    growth: float = 1.25
    """Factor by which it has to grow over the last probes; the wobble of a plateau is a tenth."""
    rising: float = 0.9
    """Share of the pairs of these probes of which the later has to be the higher. Of ten
    probes in random order one in 5,600 does so."""
    _was: bool = False

    def __post_init__(self) -> None:
        if self.times_floor <= 1 or self.growth <= 1 or not 0 < self.rising <= 1:
            raise UsageError(
                "growing_kurtosis: times_floor and growth are above 1, rising is a share; got "
                f"{self.times_floor:g}, {self.growth:g} and {self.rising:g}"
            )

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        table = moment.table
        if len(table.steps) < WINDOW:
            return ()
        columns = [c for c in table.columns_of(KURTOSIS) if table.places[c].site in SITES]
        rows, floors = table.recent(), table.floors
        high = [c for c in columns if rows[-1, c] >= self.times_floor * floors[c]]
        growing = {
            c: factor
            for c in high
            if share_rising(rows[:, c]) >= self.rising and (factor := growth(rows[:, c])) >= self.growth
        }
        was, self._was = self._was, bool(growing)
        if was or not growing:
            return ()
        column = moment.first(growing)
        return (self._finding(moment, column, growing[column], len(growing) - 1),)

    def _finding(self, moment: Moment, column: int, factor: float, others: int) -> Finding:
        table, place = moment.table, moment.table.places[column]
        over = float(moment.values[column] / table.floors[column])
        return moment.finding(
            column,
            rule="growing_kurtosis",
            severity="watch",
            last_good_step=table.steps[0],
            channel=moment.loudest_channel(place),
            sentence=(
                f"OSP kurtosis at {place.words} is {over:,.0f} times its floor at step {moment.step:,}, "
                f"having grown {factor:.2f}-fold over the last {len(table.steps)} probes"
                + (f"; at {counted(others, 'other place')} likewise" if others else "")
            ),
        )
