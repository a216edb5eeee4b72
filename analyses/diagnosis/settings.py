"""Question 3, of the optimizers themselves: the rates and decays that they held at every logged step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding
from osp_diag.schema import OPTIMIZER_SETTINGS

__all__ = ["changed_settings"]

ALIKE = 1e-3
"""Relative difference up to which two rates are the same: the schedule's own rounding is 1e-7."""


def changed_settings(case: Case) -> Iterator[Finding]:
    """Rates and decays of the optimizers that are not those of the configuration."""
    settings = case.logged(OPTIMIZER_SETTINGS)
    if settings is None:
        case.not_recorded.append(
            "learning rate and decay as the optimizers held them at every step: the run has no group "
            "optimizer_settings"
        )
        return
    findings = [*_rates(case, settings), *_decays(case, settings)]
    if not findings:
        case.ruled_out.append(
            "the optimizers held the learning rates and weight decays that configuration and schedule give"
        )
    yield from findings


def _rates(case: Case, settings: xr.Dataset) -> Iterator[Finding]:
    """The ratio of each group's rate to the configured one, Σ over groups told together where it is one."""
    logged = case.run.series["learning_rate"].reindex(step=settings["step"].values).values
    begun: dict[tuple[int, float], list[str]] = {}
    for group in settings["parameter_group"].values:
        rates = settings["learning_rate"].sel(parameter_group=group).values
        for step, factor in _departures(case, str(group), settings["step"].values, rates, logged):
            key = next(
                (k for k in begun if k[0] == step and np.isclose(k[1], factor, rtol=0.01)), (step, factor)
            )
            begun.setdefault(key, []).append(str(group))
    for (step, factor), groups in begun.items():
        where = "all groups" if len(groups) == settings.sizes["parameter_group"] else ", ".join(groups)
        yield Finding(
            "learning_rate",
            f"learning rate × {factor:.3g} in {where} of the optimizers",
            "proved",
            _bracket(settings["step"].values, step),
            (
                f"at step {step} the optimizers held {factor:.3g} times the rate that configuration and "
                "schedule give",
            ),
        )


def _departures(
    case: Case, group: str, steps: np.ndarray, rates: np.ndarray, logged: np.ndarray
) -> Iterator[tuple[int, float]]:
    expected_before: float | None = None
    for step, rate, base in zip(steps, rates, logged, strict=True):
        if not (np.isfinite(rate) and np.isfinite(base)) or base <= 0:
            continue
        config = case.config_at(int(step))
        peak, outer = config.get("optimizer.lr"), config.get("optimizer.embedding_lr")
        ratio = rate / base
        allowed = [1.0, *([outer / peak] if outer and peak and group.startswith("adamw") else [])]
        fits = any(abs(ratio / value - 1) < ALIKE for value in allowed)
        if not fits and (expected_before is None or abs(ratio / expected_before - 1) > ALIKE):
            yield int(step), float(ratio / allowed[-1])
        expected_before = ratio
        if not fits:
            return


def _decays(case: Case, settings: xr.Dataset) -> Iterator[Finding]:
    steps = settings["step"].values
    begun: dict[tuple[int, float, float], list[str]] = {}
    for group in settings["parameter_group"].values:
        if str(group).partition("/")[0].endswith(".vector"):
            continue
        values = settings["weight_decay"].sel(parameter_group=group).values
        for step, value in zip(steps, values, strict=True):
            configured = case.config_at(int(step)).get("optimizer.weight_decay")
            if (
                np.isfinite(value)
                and configured is not None
                and abs(value - configured) > ALIKE * max(configured, 1e-12)
            ):
                begun.setdefault((int(step), float(configured), float(value)), []).append(str(group))
                break
    for (step, configured, value), groups in begun.items():
        yield Finding(
            "weight_decay",
            f"weight decay {value:g} in place of {configured:g}"
            if value
            else f"no weight decay ({configured:g} configured)",
            "proved",
            _bracket(steps, step),
            (f"the optimizers held a decay of {value:g} for {', '.join(groups)} at step {step}",),
        )


def _bracket(steps: np.ndarray, step: int) -> Bracket:
    earlier = [int(other) for other in steps if other < step]
    return Bracket(earlier[-1] if earlier and earlier[-1] > 0 else None, step)
