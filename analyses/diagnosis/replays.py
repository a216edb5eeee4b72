"""Question 5: the steps after the last good checkpoint once more; where the run parts from them, and how."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Confidence, Finding, Place
from osp_diag.laboratory import Replay

__all__ = ["AFFORDABLE", "replay_steps", "replayed"]

AFFORDABLE = 15.0
"""Seconds that a replay may take without being asked for."""
ALIKE = 1e-6
"""Relative difference of losses that float32 on a CPU never has between the same steps."""
NOISE = 2e-3
"""The same of a GPU or of bfloat16, where sums are not made in one order."""
SAME_RULE = 0.02
"""Residual of the fit Δ ≈ a · Δreplay + b · W up to which the rule of the step is the same."""
ROUNDED = 0.1
"""Residual up to which steps that all differ may differ by rounding; beyond it they have little in common."""
LEAST_FACTOR = 0.02
LEAST_DECAY = 1e-6


def replay_steps(case: Case, most: int | None) -> tuple[int, int] | None:
    """(checkpoint, last step) of a replay that is worth its time; None where there is none.

    Parameters
    ----------
    most : steps that were allowed; None: what takes no longer than :data:`AFFORDABLE`
    """
    if case.laboratory is None or not case.checkpoints or case.regression_bracket is None:
        return None
    start = case.checkpoint_up_to(case.regression_bracket.good)
    if start is None:
        return None
    last = case.checkpoint_after(start.step)
    until = case.regression_bracket.bad if last is None else max(last.step, case.regression_bracket.bad)
    if most is not None:
        return (start.step, min(until, start.step + most)) if most > 0 else None
    seconds = case.laboratory.seconds_per_step()
    if seconds is None:
        return None
    steps = min(until - start.step, int(AFFORDABLE / seconds))
    return (start.step, start.step + steps) if steps > 0 else None


def replayed(case: Case, most: int | None = None) -> Iterator[Finding]:
    """What a replay says, unless the earlier questions proved a cause within the bracket."""
    bracket = case.regression_bracket
    if bracket is None or case.laboratory is None or not case.trains:
        return
    plan = replay_steps(case, most)
    if plan is None:
        case.not_recorded.append(
            "a replay: no checkpoint is from before the onset, what a step takes is not recorded, or no step "
            f"was allowed (by default as many as take {AFFORDABLE:g} s; --replay N allows N)"
        )
        return
    known = any(
        finding.confidence != "consistent with"
        and finding.bracket is not None
        and (finding.bracket.good or 0) < bracket.bad
        for finding in case.findings
    )
    if known and most is None:
        return
    case.replay = replay = case.laboratory.replay(*plan)
    findings = list(_judged(case, replay))
    if not findings:
        case.ruled_out.append(
            f"steps {plan[0] + 1} to {plan[1]}, made again from their checkpoint, gave the same losses"
            + (", and weights" if np.isfinite(replay.steps["weights_agree"].values).any() else "")
        )
    yield from findings


def _judged(case: Case, replay: Replay) -> Iterator[Finding]:
    table = replay.steps
    exact = case.computes_exactly(replay.start + 1)
    confidence: Confidence = "proved" if exact else "measured"
    tolerance = ALIKE if exact else NOISE
    steps = table["step"].values
    losses = table["loss"].values
    off = np.abs(table["replayed_loss"].values - losses) > tolerance * np.abs(losses)
    batch = _first(table["batch_agrees"].values == 0)
    loss = _first(off)
    weights = _first(table["weights_agree"].values < 1)
    if batch is not None and (loss is None or batch <= loss):
        yield Finding(
            "data", "another batch than the data give at that step", confidence, _at(steps, batch, replay),
            (f"the hash of the batch at step {steps[batch]} is another than in the replay",),
        )  # fmt: skip
        return
    if weights is not None and (loss is None or weights < loss) and exact and replay.parameters is not None:
        yield from _rule(replay.parameters, _at(steps, weights, replay), int(steps[weights]))
        return
    if loss is not None:
        recorded, again = (float(table[name].values[loss]) for name in ("loss", "replayed_loss"))
        text = f"the loss of step {steps[loss]} was {recorded:.6g}, and is {again:.6g} in the replay"
        known = bool(np.isfinite(table["batch_agrees"].values[loss]))
        family = "function" if known else "data"
        unsure = "the same batch gave another loss: the function, or weights changed between two steps"
        cause = unsure if known else "another loss: batch, function or weights"
        yield Finding(family, cause, "consistent with", _at(steps, loss, replay), (text,))


def _rule(parameters: xr.Dataset, bracket: Bracket, step: int) -> Iterator[Finding]:
    """What the fit of every parameter's step says: a factor, a decay, other owners, rounding."""
    same = parameters["is_same"].values
    others = parameters.isel(parameter=~same)
    names = tuple(str(name) for name in others["parameter"].values)
    factors, decays = others["step_factor"].values, others["decay"].values
    fits = others["residual"].values < SAME_RULE
    share = f"{int(same.sum())} of {same.size} parameters are the same to the bit at step {step}"
    factor, decay = float(np.median(factors)), float(np.median(decays))
    text = f"{share}; of the others Δ ≈ {factor:.4g} · Δreplay − {decay:.3g} · W (medians)"
    if fits.mean() > 0.8 and abs(factor - 1) > LEAST_FACTOR:
        yield Finding(
            "learning_rate", f"learning rate × {factor:.3g}", "proved", bracket, (text,), Place(names)
        )
    elif fits.mean() > 0.8 and abs(decay) > LEAST_DECAY:
        cause = "more weight decay" if decay > 0 else "less weight decay, or none"
        yield Finding("weight_decay", f"{cause} than configured", "proved", bracket, (text,), Place(names))
    elif len(names) <= max(1, 0.1 * same.size):
        cause = f"{', '.join(names[:3])} changed by something else than the step"
        yield Finding("weight_edit", cause, "proved", bracket, (text,), Place(names))
    elif same.any():
        yield Finding(
            "optimizer_routing",
            f"another rule moves {len(names)} parameters",
            "measured",
            bracket,
            (text,),
            Place(names),
        )
    elif np.nanmedian(others["residual"].values) < ROUNDED:
        yield Finding("precision", "every step is rounded otherwise", "consistent with", bracket, (text,))


def _first(rows: np.ndarray) -> int | None:
    places = np.flatnonzero(rows)
    return int(places[0]) if places.size else None


def _at(steps: np.ndarray, place: int, replay: Replay) -> Bracket:
    return Bracket(int(steps[place - 1]) if place else replay.start, int(steps[place]))
