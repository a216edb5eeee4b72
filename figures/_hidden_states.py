"""The OSP kurtosis of a run's hidden states, for every figure that draws it over runs."""

from __future__ import annotations

import numpy as np

from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.headline import hidden_states, mean_of_states
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.schema import HIDDEN_STATES

__all__ = ["KURTOSIS", "kurtosis_by_step"]

KURTOSIS = "osp_excess_kurtosis/1, mean over hidden states"
"""What captions call it."""


def kurtosis_by_step(run: Run, figure: str, stratum: str = "all") -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over hidden states at each; NaN where one of them has no number.

    Raises
    ------
    StoreError : it was not measured at the embedding and the blocks' outputs
    UsageError : no stratum of that name
    """
    # Why all of them or no number: docs/decisions.md, The house.
    states, problem = hidden_states(
        {site: run.at(site) for site in HIDDEN_STATES if site in run.sites}, run.declared_absent
    )
    if not states:
        raise StoreError(f"{figure}: in the run of {model_name(run.attrs)} {problem}; probe with both sites")
    strata = [str(name) for name in states[0]["stratum"].values]
    if stratum not in strata:
        raise UsageError(f"{figure}: stratum is one of {', '.join(strata)}, not {stratum!r}")
    mean = mean_of_states([state.sel(stratum=stratum) for state in states])
    return run.steps.astype(float), mean.transpose("step").values
