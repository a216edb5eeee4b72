"""Steps that the trainer passed over because loss or gradient went wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.rule import RunningRule
from osp_diag.monitoring.scalars import scalar
from osp_diag.runs.run import Run
from osp_diag.wording import counted


@dataclass
class Rule(RunningRule):
    """Any of them; our trainer marks them with ``skipped_step``."""

    def of_run(self, run: Run) -> Iterable[Finding]:
        bad = np.flatnonzero(scalar(run, "skipped_step") > 0)
        if not bad.size:
            return ()
        steps = run.series["step"].values
        last, first = int(steps[bad[-1]]), int(steps[bad[0]])
        return (
            Finding(
                rule="diverged_steps",
                severity="bad",
                step=last,
                last_good_step=int(steps[bad[0] - 1]) if bad[0] else None,
                first_bad_step=first,
                statistic="skipped_step",
                value=float(bad.size),
                sentence=(
                    f"the trainer passed over {counted(bad.size, 'diverged step')}, the last is {last:,}"
                ),
            ),
        )
