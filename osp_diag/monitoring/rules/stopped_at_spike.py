"""The trainer's own stop at a spike of the loss (``divergence.spike``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.rule import RunningRule
from osp_diag.monitoring.scalars import scalar
from osp_diag.runs.run import Run


@dataclass
class Rule(RunningRule):
    """A stop at a step whose loss and gradient norm are finite; nothing moved in that step or since."""

    def of_run(self, run: Run) -> Iterable[Finding]:
        stopped = np.flatnonzero(scalar(run, "stopped_step") > 0)
        if not stopped.size:
            return ()
        last = stopped[-1]
        loss, norm, step = scalar(run, "loss"), scalar(run, "gradient_norm"), int(run.series["step"][last])
        if not np.isfinite(loss[last] + norm[last]):
            return ()
        before = loss[:last][np.isfinite(loss[:last])][-10:]
        usual = ""
        if before.size:
            usual = f", the median of the {before.size} recorded before it is {np.median(before):.4g}"
        return (
            Finding(
                rule="stopped_at_spike",
                severity="bad",
                step=step,
                last_good_step=step - 1,
                first_bad_step=step,
                statistic="loss",
                value=float(loss[last]),
                sentence=(
                    f"training stopped at step {step:,}: its loss of {loss[last]:.4g} is a spike{usual}. "
                    f"The state after step {step - 1:,} is saved: go on with --resume --set "
                    "divergence.policy=skip, which passes over such steps, or begin again with a lower "
                    "optimizer.lr"
                ),
            ),
        )
