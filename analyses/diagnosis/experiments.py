"""Question 7: edits of a checkpoint and short trainings with one part put back, each beside its control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import xarray as xr

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding
from osp_diag.analyses.diagnosis.recipe import RECIPE
from osp_diag.laboratory import CheckpointState, Fork

__all__ = ["experiments", "verified"]

EDITS = ("clip_rows", "average_gains")
LOSS_OF_A_REMEDY = 0.5
"""Nats by which a part put back may raise the held-out loss and still be named."""
SHARE = 0.5
"""Share of the rise over the control that a part has to take away to be named."""


def experiments(case: Case, steps: int) -> Iterator[Finding]:
    """What was measured about parts of the recipe, where nothing recorded explains a rise."""
    proved = any(finding.confidence == "proved" for finding in case.findings)
    if proved or case.laboratory is None or not case.is_raised or not case.checkpoints:
        return
    last = case.checkpoints[-1]
    for edit in EDITS:
        case.ruled_out.append(case.laboratory.edited(last.step, edit).sentence)
    start = _start(case, steps)
    if start is None:
        case.not_recorded.append(f"parts put back: no checkpoint has {steps} recorded steps after it")
        return
    yield from _parts_put_back(case, start, start.step + steps)


def _start(case: Case, steps: int) -> CheckpointState | None:
    """The last checkpoint before the onset, or the latest that leaves so many steps."""
    last = int(case.run.steps[-1])
    good = None if case.regression_bracket is None else case.regression_bracket.good
    early = case.checkpoint_up_to(good)
    return early if early is not None and early.step + steps <= last else case.checkpoint_up_to(last - steps)


def _parts_put_back(case: Case, start: CheckpointState, until: int) -> Iterator[Finding]:
    assert case.laboratory is not None
    as_it_was = _kurtosis_at(case, until)
    for key, (family, values, cause, _) in RECIPE.items():
        now = start.config.get(key)
        if key not in start.config or now in values:
            continue
        fork = case.laboratory.fork(start.step, until, f"with {key}={values[0]}", {key: values[0]})
        control = case.laboratory.control(start.step, until, f"control of {key}", fork.reset)
        text = (
            f"trained from step {start.step} to {until} {fork.label}, it {_ending(fork)}; its control, with "
            f"the same optimizer states reset, {_ending(control)}; the run had kurtosis {as_it_was:.3g}"
        )
        base = fork.kurtosis[0]
        rise, left = control.kurtosis[-1] - base, fork.kurtosis[-1] - base
        dearer = fork.held_out_loss[-1] - control.held_out_loss[-1]
        if rise > 0 and left < (1 - SHARE) * rise and dearer < LOSS_OF_A_REMEDY:
            yield Finding(family, cause, "measured", Bracket(None, 1), (text,))
        else:
            case.ruled_out.append(text)


def _ending(fork: Fork) -> str:
    return f"ends with kurtosis {fork.kurtosis[-1]:.3g} and held-out loss {fork.held_out_loss[-1]:.4g}"


def _kurtosis_at(case: Case, step: int) -> float:
    return _nearest(case.kurtosis, step)


def _held_out_loss_at(case: Case, step: int) -> float:
    series = case.run.series
    return _nearest(series["held_out_loss"].dropna("step") if "held_out_loss" in series else None, step)


def _nearest(values: xr.DataArray | None, step: int) -> float:
    """The value at the nearest step that has one; NaN where none has."""
    if values is None or not values.size:
        return float("nan")
    return float(values.sel(step=step, method="nearest"))


def _remedied(case: Case, start: int, until: int, changes: Mapping[str, Any]) -> Fork:
    """From a checkpoint on with the remedy; remedies that only keep what the checkpoint has are one fork."""
    assert case.laboratory is not None
    own = case.checkpoint_up_to(start)
    differing = {key: value for key, value in changes.items() if own is None or own.config.get(key) != value}
    key = (start, until, str(sorted(differing.items())))
    if key not in case.forks:
        case.forks[key] = case.laboratory.fork(start, until, "trying the remedy", differing)
    return case.forks[key]


def verified(case: Case, finding: Finding, steps: int) -> Finding:
    """The finding, its remedy tried from before the onset: kurtosis and loss beside what the run did."""
    remedy = finding.remedy
    if remedy is None or remedy.start is None or case.laboratory is None or finding.bracket is None:
        return finding
    until = min(remedy.start + steps, int(case.run.steps[-1]))
    if until <= finding.bracket.bad - 1:
        return replace(finding, remedy=replace(remedy, outcome="not tried: the run ends before the onset"))
    fork = _remedied(case, remedy.start, until, remedy.changes)
    was = _kurtosis_at(case, until)
    loss = _held_out_loss_at(case, until)
    better = fork.kurtosis[-1] <= was * 1.1 or fork.kurtosis[-1] <= fork.kurtosis[0] * 1.25
    good = better and not fork.held_out_loss[-1] > loss + 0.05
    outcome = (
        f"at step {until} kurtosis {fork.kurtosis[-1]:.3g} (the run had {was:.3g}), held-out loss "
        f"{fork.held_out_loss[-1]:.4g} (the run had {loss:.4g})"
    )
    return replace(finding, remedy=replace(remedy, verified=bool(good), outcome=outcome, fork=fork))
