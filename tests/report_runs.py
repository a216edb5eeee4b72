"""Runs for the tests of the report, some with names and tokens that mean harm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from osp_diag.runs.run import Run
from tests.recipe_runs import training_run
from tests.synthetic_runs import Plan, synthetic_run, with_attrs

HOSTILE_NAME = "</script><script>hurt('name')</script><img src=x onerror=hurt('image')> %{x} {{ 7 * 7 }}"
HOSTILE_TOKEN = "<b onmouseover=hurt('token')>&lt;</b>"
GROWING = (0.2, 0.2, 0.4, 1.6, 6.0, 9.0)


def checkpoint(**changes: object) -> Run:
    """A model with massive activations, an everyday outlier channel and sinks, 8 tokens in its snapshot."""
    return synthetic_run(Plan(tokens=8, **changes))  # type: ignore[arg-type]


def hostile_checkpoint(**changes: object) -> Run:
    """The same under a name, and with tokens, that would run as scripts if they were markup."""
    run = with_attrs(checkpoint(**changes), model_name=HOSTILE_NAME, token_source=HOSTILE_NAME)
    nodes = {node.path: node.to_dataset(inherit=False) for node in run.tree.subtree}
    count = nodes["/snapshot"].sizes["token"]
    nodes["/snapshot"] = nodes["/snapshot"].assign(token_text=("token", [HOSTILE_TOKEN] * count))
    return Run(xr.DataTree.from_dict(nodes))


def trainings() -> list[Run]:
    """Adam, whose kurtosis grows, and OSP, whose stays; of one width."""
    return [training_run("Adam", GROWING), training_run("OSP", [0.2] * len(GROWING))]


def spiked(run: Run, step: int, layer: int, value: float, sites: Sequence[str] = ("residual_post",)) -> Run:
    """The run with one kurtosis replaced, for all tokens and for ``rest``."""
    nodes = {node.path: node.to_dataset(inherit=False).copy(deep=True) for node in run.tree.subtree}
    place = int(np.flatnonzero(run.steps == step)[0])
    for site in sites:
        kurtosis = nodes[f"/{site}"]["osp_excess_kurtosis"].transpose("step", "layer", "stratum")
        kurtosis.values[place, layer, [0, 3]] = value
        nodes[f"/{site}"]["osp_excess_kurtosis"] = kurtosis
    return Run(xr.DataTree.from_dict(nodes))
