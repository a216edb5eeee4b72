"""Question 7: edits of a checkpoint and short trainings with one part put back, each beside its control."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import t

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding
from osp_diag.analyses.diagnosis.recipe import RECIPE
from osp_diag.analyses.diagnosis.when import RISEN, floor_of
from osp_diag.analyses.summary.rules import NEAR_GAUSSIAN
from osp_diag.laboratory import CheckpointState, Fork

__all__ = ["experiments", "has_helped", "verified"]

EDITS = ("clip_rows", "average_gains")
ORDERS = (0, 1)
"""Of the batches: the run's own and another. Two, so that the controls have a spread."""
LOSS_DIFFERENCE = 0.05
"""Nats of held-out loss by which a fork differs from the run."""
CERTAINTY = 0.99
"""One-sided level of Student's t at which a part put back differs from its control."""


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


@dataclass(frozen=True)
class _Putback:
    """A part of the recipe put back, and its controls, by order of the batches."""

    family: str
    cause: str
    forks: tuple[Fork, ...]
    controls: tuple[Fork, ...]


def _parts_put_back(case: Case, start: CheckpointState, until: int) -> Iterator[Finding]:
    assert case.laboratory is not None
    least, as_it_was = NEAR_GAUSSIAN * floor_of(case), _kurtosis_at(case, until)
    controls: dict[tuple[str, ...], tuple[Fork, ...]] = {}
    parts = []
    for key, (family, values, cause, _) in RECIPE.items():
        if key not in start.config or start.config[key] in values:
            continue
        change = {key: values[0]}
        forks = tuple(
            case.laboratory.fork(start.step, until, f"with {key}={values[0]}", change, order=order)
            for order in ORDERS
        )
        reset = forks[0].reset
        if reset not in controls:
            controls[reset] = tuple(
                case.laboratory.control(start.step, until, f"control of {key}", reset, order=order)
                for order in ORDERS
            )
        parts.append(_Putback(family, cause, forks, controls[reset]))
    spread = _error([[_log_kurtosis(fork, least) for fork in of] for of in controls.values()])
    dearer = _error([[fork.held_out_loss[-1] for fork in of] for of in controls.values()])
    for part in sorted(parts, key=lambda part: -_effect(part, least)):
        effect, cost = _effect(part, least), _cost(part)
        text = (
            f"trained from step {start.step} to {until} {part.forks[0].label}, it {_ending(part.forks)}; its "
            f"control, with the same optimizer states reset, {_ending(part.controls)}; the run had kurtosis "
            f"{as_it_was:.3g}; × {math.exp(-effect):.2g} in the mean, by chance × {math.exp(-spread):.2g}"
        )
        if effect > spread and cost <= dearer:
            yield Finding(part.family, part.cause, "measured", Bracket(None, 1), (text,))
        else:
            case.ruled_out.append(text)


def _log_kurtosis(fork: Fork, least: float) -> float:
    """ln of the last kurtosis, not below ``least``: what is at the floor is no better further down."""
    return math.log(max(fork.kurtosis[-1], least, sys.float_info.min))


def _effect(part: _Putback, least: float) -> float:
    """How much lower ln kurtosis ends than in the controls, in the mean over the orders."""
    pairs = zip(part.controls, part.forks, strict=True)
    return float(np.mean([_log_kurtosis(one, least) - _log_kurtosis(other, least) for one, other in pairs]))


def _cost(part: _Putback) -> float:
    """How far the held-out loss ends above the checkpoint's own: an edit that unlearns is no remedy."""
    return float(np.mean([fork.held_out_loss[-1] - fork.held_out_loss[0] for fork in part.forks]))


def _error(groups: list[list[float]]) -> float:
    """By how much a mean over the orders differs from another by chance, at :data:`CERTAINTY`.

    Within each group are the same trainings with other batches. s² is their pooled variance with ν degrees of
    freedom; the difference of two means of n has the variance 2s²/n, so that it is t(ν) · s · √(2/n).
    """
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return math.inf
    variance = sum(float(np.var(group)) * len(group) for group in groups) / freedom
    return float(t.ppf(CERTAINTY, freedom)) * math.sqrt(2 * variance / len(ORDERS))


def _ending(forks: Sequence[Fork]) -> str:
    kurtosis = " and ".join(f"{fork.kurtosis[-1]:.3g}" for fork in forks)
    losses = " and ".join(f"{fork.held_out_loss[-1]:.4g}" for fork in forks)
    return f"ends with kurtosis {kurtosis} and held-out loss {losses} in {len(forks)} orders of the batches"


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
    outcome = (
        f"at step {until} kurtosis {fork.kurtosis[-1]:.3g} (the run had {was:.3g}), held-out loss "
        f"{fork.held_out_loss[-1]:.4g} (the run had {loss:.4g})"
    )
    helped = has_helped(case, fork, was, loss)
    if helped is None:
        outcome += "; neither had risen by then, so that nothing was there to undo"
    return replace(finding, remedy=replace(remedy, verified=helped, outcome=outcome, fork=fork))


def has_helped(case: Case, fork: Fork, was: float, loss: float) -> bool | None:
    """Whether a remedy took back what rose; None where nothing had risen.

    Kurtosis counts from where noise ends, and by the factor from which on it has risen.

    Parameters
    ----------
    fork : the training with the remedy
    was, loss : the run's kurtosis and held-out loss at the fork's last step
    """
    least = NEAR_GAUSSIAN * floor_of(case)
    start, end, run = least, least, least
    if not math.isnan(fork.kurtosis[0]):
        start = max(fork.kurtosis[0], least)
        # What became NaN on the way has risen beyond every number.
        end, run = (math.inf if math.isnan(k) else max(k, least) for k in (fork.kurtosis[-1], was))
    gained = loss - fork.held_out_loss[-1]
    if end == math.inf or end > RISEN * max(start, run) or gained < -LOSS_DIFFERENCE:
        return False
    if run > RISEN * start:
        return bool(end <= max(run / RISEN, RISEN * start))
    return True if gained > LOSS_DIFFERENCE else None
