"""Runs that grow while somebody looks on, with numbers that follow from the step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.writer import RunWriter
from tests.synthetic_runs import STRATA

WIDTH = 64
FLOOR = gaussian_floor(WIDTH)
EPSILONS, POSITIONS = [0.1, 0.3], [0, 1]

ATTRIBUTES: dict[str, Any] = {
    "model_name": "grown",
    "architecture": "Llama",
    "number_of_layers": 3,
    "hidden_size": WIDTH,
    "config": {"steps": 1000},
    "created": "2026-01-01T00:00:00+00:00",
    "command": "osp-diag train grown",
}


def activation(
    over_floor: np.ndarray, *, bad_layer: int | None = None, site_layers: list[int] | None = None
) -> xr.Dataset:
    """What is measured at a site whose layers have these kurtoses, as multiples of the floor."""
    kurtosis = np.repeat(FLOOR * np.asarray(over_floor, float)[:, None], len(STRATA), axis=1)
    kurtosis[:, 1] *= 2  # the first token has twice that
    bad = np.zeros_like(kurtosis)
    if bad_layer is not None:
        bad[bad_layer] = 3
    told = {"estimator": "osp_excess_kurtosis/1", "floor": FLOOR, "ceiling": WIDTH - 3.0, "units": "1"}
    inverse = {"estimator": "channel_concentration/1", "floor": float(WIDTH), "ceiling": 1.0}
    layers = list(range(len(kurtosis))) if site_layers is None else site_layers
    return xr.Dataset(
        {
            "osp_excess_kurtosis": (("layer", "stratum"), kurtosis, told),
            "max_median_ratio": (("layer", "stratum"), 3 + kurtosis, {"estimator": "max_median_ratio/1"}),
            "nonfinite_token_count": (("layer", "stratum"), bad),
            "participation_ratio": (("layer", "stratum"), WIDTH / (1 + kurtosis), inverse),
        },
        coords={"layer": layers, "stratum": list(STRATA)},
    )


def groups(
    over_floor: Iterable[float], *, sink: float = 0.5, heads: int = 2, bad_layer: int | None = None
) -> dict[str, xr.Dataset]:
    """One probed step: embedding and final norm lie at the floor, blocks where ``over_floor`` says."""
    blocks = np.asarray(list(over_floor), float)
    rates = np.full((len(blocks), heads, len(EPSILONS), len(POSITIONS)), 0.01)
    rates[:, 0, EPSILONS.index(0.3), POSITIONS.index(0)] = sink
    rates[:, 1:, EPSILONS.index(0.3), POSITIONS.index(0)] = 0.0
    coords = {
        "layer": np.arange(len(blocks)),
        "head": np.arange(heads),
        "epsilon": EPSILONS,
        "sink_position": POSITIONS,
    }
    dims = ("layer", "head", "epsilon", "sink_position")
    return {
        "embedding": activation(np.ones(1)),
        "residual_post": activation(blocks, bad_layer=bad_layer),
        "final_norm": activation(np.ones(1), site_layers=[len(blocks) - 1]),
        "attention": xr.Dataset({"sink_rate": (dims, rates, {"estimator": "sink_rate/1"})}, coords=coords),
    }


def scalars(step: int) -> dict[str, float]:
    """What a trainer records of a step; the loss at step n is 5 − n/1000."""
    return {
        "loss": 5.0 - step / 1000,
        "gradient_norm": 1.0,
        "learning_rate": 1e-3,
        "step_seconds": 0.5,
        "tokens_per_second": 4096.0,
    }


def record(writer: RunWriter, steps: Iterable[int], layers: int = 3, **changes: Any) -> None:
    """Probe and train these steps: layer l lies (l + 1) × (1 + step/100) times above its floor."""
    for step in steps:
        if step:
            writer.append_series(step, scalars(step))
        writer.append(step, groups((1 + np.arange(layers)) * (1 + step / 100), **changes))
        writer.append_series(step, {"probe_seconds": 0.1, "held_out_loss": 5.1 - step / 1000})


def grown_run(path: Path, steps: Iterable[int] = range(0, 60, 10), **attributes: Any) -> Path:
    """A run of these steps, closed."""
    with RunWriter(path, ATTRIBUTES | attributes) as writer:
        record(writer, steps)
    return path


def followed(path: Path) -> FollowedRun:
    run = FollowedRun(path)
    run.refresh()
    return run


def written(path: Path, courses: Any, **changes: Any) -> FollowedRun:
    """A run whose layers take these courses, as multiples of the floor; (layer, step)."""
    with RunWriter(path, ATTRIBUTES | changes.pop("attributes", {}), block=1000) as writer:
        for step, over in enumerate(np.asarray(courses, float).T):
            writer.append(step, groups(over, **changes))
    return followed(path)
