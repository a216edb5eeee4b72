"""Question 1: did anything get worse, and between which steps?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket
from osp_diag.analyses.summary.rules import NEAR_GAUSSIAN
from osp_diag.monitoring.limits import LOSS_RISE
from osp_diag.runs.headline import hidden_states, mean_of_states, of_all_tokens
from osp_diag.runs.run import Run
from osp_diag.schema import HIDDEN_STATES, KURTOSIS

__all__ = ["RISEN", "Regression", "floor_of", "is_raised", "regression_of"]

RISEN = 1.25
"""Times the largest earlier kurtosis from which on it has risen; healthy runs wobble by a tenth."""

NONFINITE = ("nonfinite_scalars", "nonfinite_activations")
OF_TRAINING_LOSS = ("loss_spike",)
"""Rules of the monitor whose findings are regressions."""


class Regression(NamedTuple):
    """What got worse, a sentence each, between which probes it was first seen, and what was compared."""

    sentences: tuple[str, ...]
    bracket: Bracket | None
    compared: tuple[str, ...]


def regression_of(case: Case) -> Regression:
    """Kurtosis and held-out loss against their own past and the noise floor; NaN and Inf; where there is no
    held-out loss, validation and training loss."""
    sentences, brackets, compared = [], [], []
    lost = dict(_lost(case))
    for sentence, bracket in lost.values():
        sentences.append(f"{sentence} ({bracket})")
        brackets.append(bracket)
    kurtosis = case.kurtosis
    if kurtosis is not None and kurtosis.sizes["step"] > 1:
        compared.append("kurtosis")
        floor = floor_of(case)
        bad = _first_above(kurtosis.values, RISEN, NEAR_GAUSSIAN * floor)
        if bad is not None:
            bracket = _bracket(kurtosis["step"].values, bad)
            top = kurtosis.values[bad:].max()
            sentences.append(
                f"kurtosis {kurtosis.values[:bad].max():.3g} → {top:.3g} ({bracket}); noise has {floor:.3g}"
            )
            brackets.append(bracket)
    for name, words in (("held_out_loss", "held-out loss"), ("validation_loss", "validation loss")):
        losses = case.scalar(name)
        if losses is None or "held-out loss" in compared:
            continue
        losses = losses.isel(step=np.flatnonzero(np.isfinite(losses.values)))
        compared += [words] if losses.size > 1 else []
        lowest = np.minimum.accumulate(losses.values) if losses.size else losses.values
        risen = np.flatnonzero(losses.values[1:] > lowest[:-1] + LOSS_RISE)
        if risen.size:
            bad = int(risen[0]) + 1
            bracket = _bracket(losses["step"].values, bad)
            sentences.append(f"{words} {lowest[bad - 1]:.3g} → {losses.values[bad:].max():.3g} ({bracket})")
            brackets.append(bracket)
    # Of other loops the training loss may be all there is.
    rules = NONFINITE if "held-out loss" in compared else (*NONFINITE, *OF_TRAINING_LOSS)
    for finding in case.noticed:
        if finding.rule in rules and finding.statistic not in lost:
            sentences.append(finding.sentence)
            brackets.append(Bracket(finding.last_good_step, finding.first_bad_step))
    brackets.sort(key=lambda bracket: bracket.bad)
    return Regression(tuple(sentences), brackets[0] if brackets else None, tuple(compared))


def _lost(case: Case) -> Iterator[tuple[str, tuple[str, Bracket]]]:
    """Statistic → what is NaN or Inf at a probe that measured it, in words, and since when."""
    for statistic, words, values in (
        (KURTOSIS, "kurtosis", _measured_kurtosis(case)),
        ("held_out_loss", "held-out loss", _measured_loss(case.run)),
    ):
        bad = np.flatnonzero(~np.isfinite([] if values is None else values.values))
        if values is None or not bad.size:
            continue
        first, steps = int(bad[0]), values["step"].values
        bracket = Bracket(int(steps[first - 1]) if first else None, int(steps[first]))
        yield statistic, (f"{words} is {float(values[first])}", bracket)


def _measured_kurtosis(case: Case) -> xr.DataArray | None:
    """The mean of the hidden states at the steps whose probe has any number of them."""
    run = case.run
    sites = {site: run.at(site) for site in HIDDEN_STATES if site in run.sites}
    states = hidden_states(sites, run.declared_absent).states
    if not states:
        return None
    has_any = np.zeros(len(run.steps), bool)
    for data in sites.values():
        for values in data.data_vars.values():
            if set(values.dims) == {"step", "layer", "stratum"}:
                has_any |= np.isfinite(values.transpose("step", ...).values).any(axis=(1, 2))
    return mean_of_states([of_all_tokens(state) for state in states]).isel(step=np.flatnonzero(has_any))


def _measured_loss(run: Run) -> xr.DataArray | None:
    """At the steps at which our trainer took one; None of another loop, of which nobody knows when it did.

    It comes with the probe's time, which is written first: of the last row it may only be missing yet.
    """
    series, config = run.series, run.attrs.get("config")
    if not {"held_out_loss", "probe_seconds"} <= set(series) or not isinstance(config, Mapping):
        return None
    losses, steps = series["held_out_loss"], series["step"].values
    is_whole = (steps < steps[-1:]) | (steps >= config.get("steps", np.inf))
    taken = ~np.isnan(losses.values) | (np.isfinite(series["probe_seconds"].values) & is_whole)
    return losses.isel(step=np.flatnonzero(taken))


def floor_of(case: Case) -> float:
    """What Gaussian noise scores at the hidden states."""
    floors = [
        case.run.at(s)["osp_excess_kurtosis"].attrs.get("floor") for s in HIDDEN_STATES if s in case.run.sites
    ]
    numbers = [float(floor) for floor in floors if isinstance(floor, (int, float))]
    return max(numbers) if numbers else 0.0


def _first_above(values: np.ndarray, times: float, least: float) -> int | None:
    """The first place that is above ``least`` and above ``times`` the largest value before it."""
    before = np.maximum.accumulate(values)[:-1]
    above = np.flatnonzero((values[1:] > times * before) & (values[1:] > least))
    return int(above[0]) + 1 if above.size else None


def _bracket(steps: np.ndarray, bad: int) -> Bracket:
    return Bracket(int(steps[bad - 1]), int(steps[bad]))


def is_raised(case: Case) -> bool:
    """Whether kurtosis is above its noise at the last probe."""
    kurtosis = case.kurtosis
    return kurtosis is not None and kurtosis.size > 0 and float(kurtosis[-1]) > NEAR_GAUSSIAN * floor_of(case)
