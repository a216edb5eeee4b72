"""The learning rate as another loop logged it: steps at which it rose as no schedule does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding
from osp_diag.schema import OPTIMIZER_SETTINGS

__all__ = ["is_jump", "jumped_rates"]

JUMP = 2.0
"""Times the largest rate so far, and times what the rise before leads to expect, from which on it is no
schedule's: a warm-up rises evenly, and a restart goes back to what was there."""


def jumped_rates(case: Case) -> Iterator[Finding]:
    """A rate that is above all before, and beyond what a warm-up would have brought."""
    if case.logged(OPTIMIZER_SETTINGS) is not None:
        return
    norms = case.scalar("gradient_norm")
    if norms is not None:
        top = norms.isel(step=int(norms.values.argmax()))
        case.ruled_out.append(
            f"the gradient's norm that was logged: median {float(norms.median()):.3g}, at most "
            f"{float(top):.3g} (step {int(top['step'])})"
        )
    rates = case.scalar("learning_rate")
    if rates is None or rates.size < 3:
        case.not_recorded.append(
            "the learning rate by step: neither the run nor trainer_state.json has three"
        )
        return
    steps, values = rates["step"].values, rates.values
    jumps = [place for place in range(len(values)) if is_jump(steps, values, place)]
    for place in jumps[:1]:
        factor = values[place] / values[place - 1]
        yield Finding(
            "learning_rate",
            f"learning rate × {factor:.3g} ({values[place - 1]:.3g} → {values[place]:.3g})",
            "proved",
            Bracket(int(steps[place - 1]), int(steps[place])),
            (
                f"the rate that was logged is {values[place - 1]:.3g} at step {steps[place - 1]} and "
                f"{values[place]:.3g} at step {steps[place]}, the largest before being "
                f"{values[:place].max():.3g}",
            ),
        )
    if not jumps:
        case.ruled_out.append("the learning rate that was logged rises nowhere as no schedule would")


def is_jump(steps: np.ndarray, values: np.ndarray, place: int) -> bool:
    """Whether the rate at a place is more than twice all before, and than they lead to expect, linearly.

    Parameters
    ----------
    steps, values : of the rates that were logged, ascending; of the first two nothing is told
    """
    if place < 2:
        return False
    one, two = values[place - 2 : place]
    if two <= 0:
        return False
    slope = (two - one) / (steps[place - 1] - steps[place - 2])
    expected = two + max(slope, 0.0) * (steps[place] - steps[place - 1])
    return bool(values[place] > JUMP * max(expected, values[:place].max()))
