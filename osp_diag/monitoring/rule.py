"""What a rule is: it looks at every logged and every probed step once, and remembers what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.moment import Moment
from osp_diag.runs.run import Run

__all__ = ["RunningRule"]


@dataclass
class RunningRule:
    """A rule of one run. Steps come in their order, a step's scalars before its probe."""

    def at_row(self, step: int, values: Mapping[str, float]) -> Iterable[Finding]:
        """What the scalars of a logged step say; NaN is what was recorded as such."""
        return ()

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        """What a probed step says."""
        return ()

    def of_run(self, run: Run) -> Iterable[Finding]:
        """What is said of a whole run in the store as it is now, in place of what was said before."""
        return ()
