"""Question 1: did anything get worse, and between which steps?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket
from osp_diag.analyses.summary.rules import NEAR_GAUSSIAN
from osp_diag.schema import HIDDEN_STATES

__all__ = ["Regression", "is_raised", "regression_of"]

RISEN = 1.25
"""Times the largest earlier kurtosis from which on it has risen; healthy runs wobble by a tenth."""
LOSS = 0.3
"""Nats by which held-out loss lies above its lowest so far from which on it has risen."""

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
    kurtosis = case.kurtosis
    if kurtosis is not None and kurtosis.sizes["step"] > 1:
        compared.append("kurtosis")
        floor = _floor(case)
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
        compared += [words] if losses.size > 1 else []
        lowest = np.minimum.accumulate(losses.values) if losses.size else losses.values
        risen = np.flatnonzero(losses.values[1:] > lowest[:-1] + LOSS)
        if risen.size:
            bad = int(risen[0]) + 1
            bracket = _bracket(losses["step"].values, bad)
            sentences.append(f"{words} {lowest[bad - 1]:.3g} → {losses.values[bad:].max():.3g} ({bracket})")
            brackets.append(bracket)
    # Of other loops the training loss may be all there is.
    rules = NONFINITE if "held-out loss" in compared else (*NONFINITE, *OF_TRAINING_LOSS)
    for finding in case.noticed:
        if finding.rule in rules:
            sentences.append(finding.sentence)
            brackets.append(Bracket(finding.last_good_step, finding.first_bad_step))
    brackets.sort(key=lambda bracket: bracket.bad)
    return Regression(tuple(sentences), brackets[0] if brackets else None, tuple(compared))


def _floor(case: Case) -> float:
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
    return kurtosis is not None and kurtosis.size > 0 and float(kurtosis[-1]) > NEAR_GAUSSIAN * _floor(case)
