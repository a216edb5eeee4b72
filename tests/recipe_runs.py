"""Made-up runs of trainings under the recipes of the OSP paper, for the tests of figures and analyses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.runs.run import Run
from tests.synthetic_runs import Plan, synthetic_run

RECIPES: dict[str, dict[str, Any]] = {
    name: {"optimizer.name": optimizer, "model.norm": norm, "model.embedding_projection": projection}
    for name, optimizer, norm, projection in (
        ("Adam", "adamw", "rmsnorm", False),
        ("Muon-only", "muon_only", "rmsnorm", False),
        ("Muon", "muon", "rmsnorm", False),
        ("Muon + SSNorm", "muon", "ssnorm", False),
        ("Muon + EmbProj", "muon", "rmsnorm", True),
        ("OSP", "muon", "ssnorm", True),
    )
}
"""The paper's names of six configurations, and the keys that tell them apart."""


def training_run(recipe: str, kurtosis: Sequence[float], *, every: int = 10, **config: Any) -> Run:
    """A run of a training of ``recipe``: the OSP kurtosis at its probes, and a loss at every step.

    Every hidden state has the kurtosis that is given, and the first token ten times as much; the maxima at
    ``residual_post`` and ``mlp_hidden`` are 100 and 20 times the kurtosis in the last layer.
    """
    plan = Plan(model_name="llama", layers=3, channels=128, sequences=2, tokens=8, massive=0.0, everyday=0.0)
    steps = [every * index for index in range(len(kurtosis))]
    run = synthetic_run(plan)
    sites = ("embedding", "residual_post", "final_norm", "attention")
    quiet = {site: run.at(site).isel(step=0, drop=True) for site in sites}
    quiet["mlp_hidden"] = quiet["residual_post"]
    per_step = [(step, _with_kurtosis(quiet, value)) for step, value in zip(steps, kurtosis, strict=True)]
    rng = np.random.default_rng(len(recipe))
    loss = {step: 3 + 5 * np.exp(-step / 90) + 0.08 * rng.standard_normal() for step in range(steps[-1] + 1)}
    rate = {step: 1000.0 + step for step in loss}
    series = {"loss": loss, "tokens_per_second": rate, "held_out_loss": {steps[-1]: 3.25}}
    told = {"name": "made-up", "seed": 0, "model.attention": "softmax", **RECIPES[recipe], **config}
    return Run.in_memory(per_step, {}, run.attrs | {"config": told, "tokens_per_step": 2048}, series)


def _with_kurtosis(quiet: dict[str, xr.Dataset], value: float) -> dict[str, xr.Dataset]:
    changed = {}
    for site, dataset in quiet.items():
        changed[site] = dataset.copy(deep=True)
        if site != "attention":
            changed[site]["osp_excess_kurtosis"].values[:] = value * np.array([1.0, 10.0, 1.0, 0.5])
    for site, factor in (("residual_post", 100.0), ("mlp_hidden", 20.0)):
        changed[site]["absolute_maximum"].values[:] = 1.0
        changed[site]["absolute_maximum"].values[-1] = factor * value
    return changed
