"""Made-up diagnoses of made-up runs, with a replay and a remedy that was tried, for the tests of figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.findings import Bracket, Diagnosis, Finding, Place, Remedy
from osp_diag.analyses.diagnosis.identity import fingerprint, last_step
from osp_diag.figures._registry import in_report
from osp_diag.laboratory import Fork, Replay
from osp_diag.runs.run import Run

__all__ = ["diagnosis_options", "made_up_diagnosis"]

PARAMETERS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "lm_head.weight",
)


def made_up_diagnosis(run: Run) -> Diagnosis:
    """In the last step layer 0 went ten times as far, layer 1 by no rule, the rest as in the replay."""
    last = last_step(run) or 0
    bracket = Bracket(last - 1 if last else None, last)
    fork = Fork(
        "trying the remedy", {"optimizer.lr": 1e-3}, (10, 15, 20), (0.2, 0.21, 0.2), (6, 5.9, 5.8), ()
    )
    remedy = Remedy("go on from step-00000010", start=10, verified=True, outcome="it is lower", fork=fork)
    finding = Finding(
        "learning_rate", "learning rate × 10", "proved", bracket, ("it was 10 times as far",),
        Place(PARAMETERS[1:3], layer=0), remedy,
    )  # fmt: skip
    return Diagnosis(
        run="made-up",
        regression=("kurtosis 0.2 → 0.9 (between steps 10 and 20); noise has 0.1",),
        compared=("kurtosis",),
        bracket=bracket,
        checkpoints=(10, 20),
        findings=(finding,),
        where=(),
        ruled_out=(),
        not_recorded=(),
        jumps=jumps(),
        replay=replay(),
        last_step=last,
        fingerprint=fingerprint(run),
    )


def jumps() -> xr.Dataset:
    """At step 20 layer 0 first, at step 30 the final norm."""
    return xr.Dataset(
        {
            "step": ("place", [np.nan, 20.0, 20.0, np.nan, 30.0]),
            "size": ("place", [0.01, 5.0, 9.0, 1.5, 4.2], {"threshold": 4.0}),
            "statistic": ("place", ["token_norm", "value_norm", "token_peak", "token_norm", "token_norm"]),
        },
        coords={
            "site": ("place", ["embedding", "attention", "residual_post", "residual_post", "final_norm"]),
            "layer": ("place", [0, 0, 0, 1, 0]),
        },
    )


def replay() -> Replay:
    """Of two steps, of which the first agrees in all and the second in a third of the parameters."""
    same = np.array([True, False, False, False, False, True])
    fits = np.array([True, True, True, False, False, True])
    steps = xr.Dataset(
        {
            "loss": ("step", [6.0, 6.5]),
            "replayed_loss": ("step", [6.0, 5.9]),
            "batch_agrees": ("step", [1.0, 1.0]),
            "weights_agree": ("step", [1.0, 1 / 3]),
        },
        coords={"step": [10, 11]},
    )
    parameters = xr.Dataset(
        {
            "is_same": ("parameter", same),
            "relative_difference": ("parameter", np.where(same, 0.0, 0.9)),
            "step_factor": ("parameter", np.where(same, 1.0, 10.0)),
            "decay": ("parameter", np.where(same, 0.0, 0.01)),
            "residual": ("parameter", np.where(fits, 1e-5, 0.5)),
        },
        coords={"parameter": list(PARAMETERS)},
    )
    return Replay(9, steps, parameters)


def diagnosis_options(name: str, runs: Any) -> dict[str, Any]:
    """What a figure needs beside its runs: made-up diagnoses, if it is drawn of some."""
    several: Sequence[Run] = runs if isinstance(runs, list | tuple) else [runs]
    return {"diagnoses": [made_up_diagnosis(run) for run in several]} if in_report(name).diagnosis else {}
