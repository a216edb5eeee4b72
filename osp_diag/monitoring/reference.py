"""A run judged against another that is known to be good: where it leaves it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from osp_diag.errors import UsageError
from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.moment import Moment, Table, stacked
from osp_diag.monitoring.places import Place, numbers_of
from osp_diag.monitoring.reading import probes_between
from osp_diag.monitoring.rule import RunningRule
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.run import Run
from osp_diag.wording import listed

__all__ = ["ReferenceRule"]


@dataclass
class ReferenceRule(RunningRule):
    """|ln(this run / the reference)| at a step that both probed, in units of the reference's largest change.

    The unit is the largest |ln| change of that number between neighbouring probes of the reference after step
    0: it holds what warm-up and decay do to a healthy training. Step 0 is not compared: other seeds begin
    otherwise.

    Raises
    ------
    UsageError : the reference has too few probes for a unit; from :meth:`of_run`, there is nothing to compare
    """

    reference: Run
    times_usual: float = 4.0
    smallest_usual: float = 0.1
    """of ln: two seeds differ by more than one run wobbles"""
    _logarithms: dict[int, np.ndarray] = field(default_factory=dict)
    _usual: np.ndarray = field(default_factory=lambda: np.empty(0))
    _index: dict[Place, int] = field(default_factory=dict)
    _last_good: int | None = None
    _is_away: bool = False
    _shares_step: bool = False
    _shares_number: bool = False

    def __post_init__(self) -> None:
        steps = [int(step) for step in self.reference.steps]
        if sum(step > 0 for step in steps) < 3:
            raise UsageError(
                f"a reference needs three probes after step 0 to say what is usual; {self.reference.path} "
                f"has them at {', '.join(map(str, steps)) or 'no step'}"
            )
        table = Table()
        for place, blocks in probes_between(self.reference, 0, len(steps)):
            table.add(steps[place], *numbers_of(blocks))
            self._logarithms[steps[place]] = table.logarithms[-1]
        after = [row for step, row in self._logarithms.items() if step > 0]
        self._index = table.index
        changes = np.abs(np.diff(stacked(after, len(table.places)), axis=0))
        self._usual = np.nan_to_num(changes).max(axis=0)

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        if moment.step == 0 or moment.step not in self._logarithms:
            return ()
        reference, places = self._logarithms[moment.step], moment.table.places
        columns = np.array([self._index.get(place, -1) for place in places])
        shared = np.flatnonzero((columns >= 0) & (columns < len(reference)))
        self._shares_step, self._shares_number = True, self._shares_number or bool(shared.size)
        difference = np.zeros(len(places))
        difference[shared] = moment.table.logarithms[-1][shared] - reference[columns[shared]]
        size = np.zeros(len(places))
        size[shared] = np.abs(difference[shared]) / np.maximum(
            self._usual[columns[shared]], self.smallest_usual
        )
        away = np.flatnonzero(size >= self.times_usual).tolist()
        was_away, self._is_away = self._is_away, bool(away)
        if not away:
            self._last_good = moment.step
        if not away or was_away:
            return ()
        column = moment.largest_at_first(away, size)
        return (self._finding(moment, column, difference[column], size[column], len(away) - 1),)

    def of_run(self, run: Run) -> Iterable[Finding]:
        """Refuse a run that has nothing to compare; one that is written, once no step can change that."""
        mine, its = run.steps, self.reference.steps
        if not len(mine) or self._shares_number:
            return ()
        both = f"{run.path} and its reference {self.reference.path}"
        if self._shares_step:
            raise UsageError(
                f"{both} share no number of a site and layer: {listed(run.sites, 4)} here, "
                f"{listed(self.reference.sites, 4)} there; name a run of the same model with the same sites"
            )
        is_growing = isinstance(run, FollowedRun) and run.writer in ("writing", "unknown")
        if not is_growing or mine[-1] >= its[-1]:
            raise UsageError(
                f"{both} were probed at no step in common after step 0: {listed([*map(str, mine)], 4)} here, "
                f"{listed([*map(str, its)], 4)} there; probe both at the same steps (probe.every)"
            )
        return ()

    def _finding(self, moment: Moment, column: int, difference: float, size: float, others: int) -> Finding:
        name, now = moment.table.places[column].full_name, moment.values[column]
        return moment.finding(
            column,
            rule="reference",
            severity="watch",
            last_good_step=self._last_good,
            size=float(size),
            sentence=(
                f"{name} is {now:.3g} at step {moment.step:,}, {np.exp(difference):.3g} "
                f"times that of the reference: {size:.1f} times its largest change from probe to probe"
                + (f"; {others:,} other numbers are away from it too" if others else "")
            ),
        )
