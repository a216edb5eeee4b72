"""A replay beside what was recorded: where they part, and by what rule the weights moved there."""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.laboratory import Replay
from osp_diag.runs.run import Run
from osp_diag.schema import WEIGHT_SKETCH

__all__ = ["compared", "fits"]


def compared(recorded: Run, again: Run, start: int) -> Replay:
    """Both at the steps after ``start`` that both have."""
    steps = np.intersect1d(recorded.series["step"].values, again.series["step"].values)
    steps = steps[steps > start]
    ours, theirs = (run.series.sel(step=steps) for run in (again, recorded))
    both_have_hashes = "batch_hash" in ours and "batch_hash" in theirs
    agrees = np.full(len(steps), np.nan)
    if both_have_hashes:
        one, two = ours["batch_hash"].values, theirs["batch_hash"].values
        agrees = np.where(np.isfinite(one) & np.isfinite(two), (one == two).astype(float), np.nan)
    weights, parameters = _weights(recorded, again, steps, start)
    table = xr.Dataset(
        {
            "loss": ("step", theirs["loss"].values, {"units": "nats"}),
            "replayed_loss": ("step", ours["loss"].values, {"units": "nats"}),
            "batch_agrees": (
                "step",
                agrees,
                {"units": "1", "definition": "1 where the batch's hash is the same"},
            ),
            "weights_agree": (
                "step",
                weights,
                {"units": "1", "definition": "share of the parameters whose sketch is the same to the bit"},
            ),
        },
        coords={"step": steps},
    )
    return Replay(start, table, parameters)


def _weights(
    recorded: Run, again: Run, steps: np.ndarray, start: int
) -> tuple[np.ndarray, xr.Dataset | None]:
    share = np.full(len(steps), np.nan)
    if WEIGHT_SKETCH not in recorded.logged_groups or WEIGHT_SKETCH not in again.logged_groups:
        return share, None
    theirs, ours = recorded.logged(WEIGHT_SKETCH)["projection"], again.logged(WEIGHT_SKETCH)["projection"]
    names = [name for name in ours["parameter"].values if name in set(theirs["parameter"].values)]
    theirs, ours = theirs.sel(parameter=names), ours.sel(parameter=names)
    for place, step in enumerate(steps):
        one, two = ours.sel(step=step).values, theirs.sel(step=step).values
        present = np.isfinite(one).all(axis=1) & np.isfinite(two).all(axis=1)
        if present.any():
            share[place] = float((one == two).all(axis=1)[present].mean())
        if share[place] < 1:
            before = start if place == 0 else int(steps[place - 1])
            if before not in theirs["step"].values:
                return share, None
            return share, fits(theirs.sel(step=before).values, two, one, names)
    return share, None


def fits(weights: np.ndarray, moved: np.ndarray, replayed: np.ndarray, names: list[str]) -> xr.Dataset:
    """Δ ≈ a · Δreplay + b · W by least squares over the projections, which are linear in all three.

    Of a scalar, whose step is parallel to it, a decay cannot be told from a longer step: b is 0 there.
    """
    factors, decays, residuals, differences = [], [], [], []
    for w, one, two in zip(weights, moved, replayed, strict=True):
        delta, again = one.astype(np.float64) - w, two.astype(np.float64) - w
        (a, b), *_ = np.linalg.lstsq(np.stack([again, w.astype(np.float64)], axis=1), delta, rcond=None)
        if _are_parallel(again, w):
            a, b = float(again @ delta) / float(again @ again), 0.0
        left = delta - a * again - b * w
        size = np.linalg.norm(delta)
        apart = np.linalg.norm(delta - again)
        differences.append(apart / size if size else np.inf if apart else 0.0)
        factors.append(a)
        decays.append(-b)
        residuals.append(np.linalg.norm(left) / size if size else 0.0)
    return xr.Dataset(
        {
            "is_same": ("parameter", (moved == replayed).all(axis=1)),
            "relative_difference": (
                "parameter",
                differences,
                {"units": "1", "definition": "‖Δ − Δreplay‖ / ‖Δ‖, of 8 projections"},
            ),
            "step_factor": ("parameter", factors, {"definition": "a in Δ ≈ a · Δreplay + b · W"}),
            "decay": ("parameter", decays, {"definition": "−b in Δ ≈ a · Δreplay + b · W"}),
            "residual": (
                "parameter",
                residuals,
                {"definition": "‖Δ − a · Δreplay − b · W‖ / ‖Δ‖, of 8 projections"},
            ),
        },
        coords={"parameter": names},
    )


def _are_parallel(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether two vectors span no plane, but for the rounding of float32."""
    size = float(np.linalg.norm(one) * np.linalg.norm(two))
    return size > 0 and 1 - abs(float(one @ two.astype(np.float64))) / size < 1e-5
