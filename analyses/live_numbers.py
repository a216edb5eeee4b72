"""Kurtosis and sinks of a run that is being followed, by place and step."""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.runs.following import FollowedRun
from osp_diag.schema import HIDDEN_STATES, KURTOSIS, SINK_EPSILON, SINK_POSITION

__all__ = ["hidden_state_kurtosis", "sink_rates"]


def hidden_state_kurtosis(run: FollowedRun) -> xr.DataArray | None:
    """The OSP kurtosis of every hidden state by step, over all tokens; None where there is none.

    Returns
    -------
    (hidden_state, step), with ``site``, ``layer`` and ``floor`` (what Gaussian noise of that width scores)
    along hidden_state: the embedding, the output of every block, the final norm
    """
    rows: list[np.ndarray] = []
    places: list[tuple[str, str, int, float]] = []
    steps = run.steps
    for site in HIDDEN_STATES:
        if KURTOSIS not in run.statistics_at(site):
            continue
        found = run.values(site, KURTOSIS, {"stratum": "all"})
        width = run.attrs.get("hidden_size")
        floor = found.attrs.get("floor") or (gaussian_floor(int(width)) if width else np.nan)
        for index, layer in enumerate(found["layer"].values):
            label = f"layer {layer}" if site == "residual_post" else site.replace("_", " ")
            places.append((label, site, int(layer), float(floor)))
            rows.append(found.values[:, index])
    if not rows:
        return None
    shortest = min(len(row) for row in rows)
    labels, sites, layers, floors = (list(part) for part in zip(*places, strict=True))
    return xr.DataArray(
        np.stack([row[:shortest] for row in rows]),
        dims=("hidden_state", "step"),
        coords={
            "hidden_state": labels,
            "step": steps[:shortest],
            "site": ("hidden_state", sites),
            "layer": ("hidden_state", layers),
            "floor": ("hidden_state", floors),
        },
        attrs={"units": "1", "estimator": "osp_excess_kurtosis/1", "definition": "mean over all tokens"},
    )


def sink_rates(run: FollowedRun) -> xr.DataArray | None:
    """The first token's sink rate at ε = 0.3 (layer, step), mean over heads; None where there is none."""
    if "sink_rate" not in run.statistics_at("attention"):
        return None
    try:
        rates = run.values(
            "attention", "sink_rate", {"epsilon": SINK_EPSILON, "sink_position": SINK_POSITION}, ("head",)
        )
    except StoreError:  # probed with other thresholds
        return None
    return rates.transpose("layer", "step").assign_attrs(epsilon=SINK_EPSILON)
