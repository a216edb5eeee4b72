"""A loss or gradient norm of NaN or Inf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.rule import RunningRule
from osp_diag.monitoring.scalars import scalar
from osp_diag.runs.run import Run
from osp_diag.wording import counted

WRITTEN_WITH = {
    "loss": ("learning_rate", "step_seconds"),
    "gradient_norm": ("learning_rate", "step_seconds"),
    "held_out_loss": ("probe_seconds",),
}
"""Scalar → those that come with it: NaN beside NaN only means that nothing was recorded at that step."""


@dataclass
class Rule(RunningRule):
    """Inf, or NaN that was recorded; in the store, NaN also stands for what was not."""

    _names: set[str] = field(default_factory=set)

    def at_row(self, step: int, values: Mapping[str, float]) -> Iterable[Finding]:
        # Inf is left to of_run where a run in the store is judged; NaN never comes here from there.
        bad = [name for name in WRITTEN_WITH if np.isnan(values.get(name, 0.0)) and name not in self._names]
        self._names |= set(bad)
        return [_finding(name, step, values[name], 0, None) for name in bad]

    def of_run(self, run: Run) -> Iterable[Finding]:
        steps, findings = run.series["step"].values, []
        for name in WRITTEN_WITH:
            if name not in run.series:
                continue
            values = scalar(run, name)
            bad = np.flatnonzero(np.isinf(values) | _recorded_as_nan(run, name))
            if bad.size:
                before = np.flatnonzero(np.isfinite(values[: bad[0]]))
                last_good = int(steps[before[-1]]) if before.size else None
                findings.append(
                    _finding(name, int(steps[bad[0]]), float(values[bad[0]]), bad.size - 1, last_good)
                )
        return findings


def _finding(name: str, step: int, value: float, later: int, last_good: int | None) -> Finding:
    return Finding(
        rule="nonfinite_scalars",
        severity="bad",
        step=step,
        last_good_step=last_good,
        first_bad_step=step,
        statistic=name,
        value=value,
        sentence=f"{name} is {value} at step {step:,}"
        + (f" and {counted(later, 'later step')}" if later else ""),
    )


def _recorded_as_nan(run: Run, name: str) -> Bool[np.ndarray, " row"]:
    """Where a scalar was recorded and is NaN, which it is as well where it was not recorded.

    Our trainer records it together with others, which tell. A loop of somebody else's may record each when it
    likes. There, NaN are taken as recorded at the end alone, where nothing but NaN has come in its rows for
    longer than ever before between two numbers.
    """
    values = scalar(run, name)
    rows = np.zeros(len(values), bool)
    for other in WRITTEN_WITH[name]:
        rows |= np.isfinite(scalar(run, other))
    if isinstance(run.attrs.get("config"), dict):
        missing = np.isnan(values) & rows
        missing[-1:] &= name != "held_out_loss"  # which comes a moment later than what it comes with
        return missing
    # Of a row in which there is no number at all something was recorded, and as NaN.
    rows |= ~np.any([np.isfinite(scalar(run, str(other))) for other in run.series], axis=0)
    rows |= np.isfinite(values)
    numbers = np.flatnonzero(np.isfinite(values[rows]))
    longest = (np.diff(numbers) - 1).max(initial=0)
    missing = np.zeros(len(values), bool)
    if len(numbers) > 1 and rows.sum() - 1 - numbers[-1] > longest:
        missing[np.flatnonzero(rows)[numbers[-1] + 1 :]] = True
    return missing & np.isnan(values)
