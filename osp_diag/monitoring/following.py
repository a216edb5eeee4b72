"""Judging a run in the store, at once or while it grows: of each look only what is new is read."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import xarray as xr

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.monitor import Monitor
from osp_diag.monitoring.reading import probes_between
from osp_diag.monitoring.reference import ReferenceRule
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.run import Run

__all__ = ["RunMonitor", "judge"]


def judge(run: Run, against: Run | None = None) -> tuple[Finding, ...]:
    """Everything that the rules find in a run as it was last looked at, by step, worst first within one.

    Parameters
    ----------
    against : a run that is known to be good, of the same sites and layers: also where this one leaves it

    Raises
    ------
    UsageError : the two share no probed step after step 0, or no site and layer
    """
    return RunMonitor(run, against).look()


class RunMonitor:
    """Judges a run as it grows: every :meth:`look` reads and judges the steps that came since the last.

    A run that was begun anew or taken back to an earlier step is judged from its beginning.
    """

    def __init__(self, run: Run, against: Run | None = None) -> None:
        self.run, self.against = run, against
        self._begin()

    def _begin(self) -> None:
        self.monitor = Monitor()
        if self.against is not None:
            self.monitor.rules.append(ReferenceRule(self.against))
        self._generation = getattr(self.run, "generation", 0)
        self._probes = 0
        self._rows = 0
        self._last_names: set[str] = set()

    def look(self) -> tuple[Finding, ...]:
        """Judge what is new; returns all findings by step. Of a followed run call ``refresh`` before."""
        with self.run.lock if isinstance(self.run, FollowedRun) else nullcontext():
            if getattr(self.run, "generation", 0) != self._generation:
                self._begin()
            self._judge_new()
            standing = [finding for rule in self.monitor.rules for finding in rule.of_run(self.run)]
        order = [*self.monitor.findings, *standing]
        return tuple(sorted(order, key=lambda finding: (finding.step, finding.rank)))

    def _judge_new(self) -> None:
        steps, series = self.run.steps, self.run.series
        for place, blocks in probes_between(self.run, self._probes, len(steps)):
            self._add_rows(series, int(steps[place]))
            self.monitor.add_probe(int(steps[place]), blocks, _Profiles(self.run, place))
        self._probes = len(steps)
        self._add_rows(series, None)

    def _add_rows(self, series: xr.Dataset, last: int | None) -> None:
        """Judge the logged steps up to ``last``; a row that is completed later is judged in parts."""
        steps = series["step"].values
        stop = len(steps) if last is None else int(np.searchsorted(steps, last, side="right"))
        start = max(0, self._rows - 1)
        new = {str(name): column.values[start:stop] for name, column in series.data_vars.items()}
        for row in range(start, stop):
            values = {name: float(column[row - start]) for name, column in new.items()}
            values = {name: value for name, value in values.items() if not np.isnan(value)}
            if row < self._rows:
                values = {name: value for name, value in values.items() if name not in self._last_names}
                self._last_names |= values.keys()
            else:
                self._rows, self._last_names = row + 1, set(values)
            if values:
                self.monitor.add_scalars(int(steps[row]), values)


class _Profiles:
    """RMS by channel of a site at a probe and the one before, read when it is asked for."""

    def __init__(self, run: Run, place: int) -> None:
        self._run, self._place = run, place

    def __call__(self, site: str) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        dims = self._run.statistics_at(site).get("channel_rms")
        if dims is None or not self._place:
            return {}, {}
        rows = self._run.rows(site, "channel_rms", self._place - 1, self._place + 1)
        if "stratum" in rows.dims:
            strata = [str(name) for name in self._run.labels(site, "stratum")]
            rows = rows.isel(stratum=strata.index("all"))
        layers = [int(layer) for layer in self._run.labels(site, "layer")]
        before, now = (dict(zip(layers, np.asarray(part), strict=True)) for part in rows.values)
        return before, now
