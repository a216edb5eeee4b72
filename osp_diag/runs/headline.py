"""The numbers to know first, each defined once: the OSP kurtosis of a model, and its largest activation.

Everything that shows, judges, compares or logs a run takes them from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from osp_diag.runs.steps import at_step, step_of
from osp_diag.schema import HIDDEN_STATES, KURTOSIS, RESIDUAL_SITES

if TYPE_CHECKING:
    from osp_diag.runs.run import Run

__all__ = [
    "HiddenStates",
    "headline",
    "headline_by_step",
    "headline_kurtosis",
    "headline_of",
    "hidden_states",
    "mean_by_stratum",
    "mean_of_states",
    "of_all_tokens",
]

Sites = Mapping[str, xr.Dataset]
"""Site → its statistics."""


class HiddenStates(NamedTuple):
    """The OSP kurtosis of each tensor that the headline number is the mean of."""

    states: list[xr.DataArray]
    """in network order; empty if one of them was not measured"""
    note: str = ""
    """why there is none, or what is special about them"""


def hidden_states(sites: Sites, absent: Mapping[str, Any] | None = None) -> HiddenStates:
    """The tensors that ``output_hidden_states`` returns, as the OSP script averages them.

    The embedding, the outputs of the blocks but the last, and the state after the final norm, which stands in
    Hugging Face's list in place of the last block's output. A model without a final norm ends with that
    output itself. With one block these are two tensors: the embedding and the final norm.

    Parameters
    ----------
    sites : site → Dataset with ``osp_excess_kurtosis`` (…, layer, stratum)
    absent : the sites that the model was found not to have. If it is given and does not name the final norm,
        a final norm that was not measured is missing; None: nothing is known of it, and the model counts as
        having none

    References
    ----------
    Park et al. 2025, Outlier-Safe Pre-Training, the released script; https://arxiv.org/abs/2506.19697
    """
    measured = {site: sites[site][KURTOSIS] for site in HIDDEN_STATES if KURTOSIS in sites.get(site, ())}
    required = ["embedding", "residual_post"]
    if absent is not None and "final_norm" not in absent:
        required.append("final_norm")
    missing = [site for site in required if site not in measured]
    # Why none: docs/decisions.md, The house.
    if missing:
        return HiddenStates(
            [], f"{KURTOSIS} was not measured at {' and '.join(missing)}, so there is no headline number"
        )
    embedding, blocks = measured["embedding"].isel(layer=0), _layers(measured["residual_post"])
    if "final_norm" not in measured:
        return HiddenStates([embedding, *blocks], "there is no final norm: last block's output taken")
    # Hugging Face's list ends with the normed state, in place of the last block's output.
    return HiddenStates([embedding, *blocks[:-1], measured["final_norm"].isel(layer=0)])


def _layers(values: xr.DataArray) -> list[xr.DataArray]:
    ordered = values.sortby("layer")
    return [ordered.isel(layer=index) for index in range(ordered.sizes["layer"])]


def mean_of_states(states: list[xr.DataArray]) -> xr.DataArray:
    """Mean over hidden states; NaN where one of them has no number, for that of others is another one."""
    parts = [state.drop_vars("layer", errors="ignore") for state in states]
    joined = xr.concat(parts, "hidden_state", coords="minimal", compat="override")
    return joined.mean("hidden_state", skipna=False)


def mean_by_stratum(states: list[xr.DataArray]) -> dict[str, float]:
    """:func:`mean_of_states` at one step; a stratum that no token belongs to is left out.

    Empty if there is no number for all tokens.
    """
    if not states:
        return {}
    mean = mean_of_states(states).load()
    if not np.isfinite(of_all_tokens(mean).values).all():
        return {}
    numbers = {str(name): float(mean.sel(stratum=name)) for name in mean["stratum"].values}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def headline_kurtosis(run: Run, *, step: int | None = None) -> dict[str, float]:
    """``osp_excess_kurtosis`` by stratum at a step (the last one), mean over the hidden states.

    Empty if one of them was not measured: a mean over others would be another number.
    """
    return mean_by_stratum(hidden_states(_hidden_sites(run, step), run.declared_absent).states)


def headline_by_step(run: Run) -> xr.DataArray | None:
    """The number of :func:`headline_kurtosis`, over all tokens, at the probed steps that have it.

    None where it was not measured at all the states that it is the mean of.
    """
    sites = {site: run.at(site) for site in HIDDEN_STATES if site in run.sites}
    states = hidden_states(sites, run.declared_absent).states
    if not states:
        return None
    return mean_of_states([of_all_tokens(state) for state in states]).dropna("step")


def _hidden_sites(run: Run, step: int | None) -> Sites:
    probed = step_of(run, step)
    return {site: at_step(run.at(site), probed) for site in HIDDEN_STATES if site in run.sites}


def headline(run: Run, *, step: int | None = None) -> dict[str, Any]:
    """The numbers to know first, at a step (the last one) and over all tokens: see :func:`headline_of`."""
    if not len(run.steps):
        return {}
    probed = step_of(run, step)
    sites = [site for site in run.sites if site in (*HIDDEN_STATES, *RESIDUAL_SITES)]
    return headline_of({site: at_step(run.at(site), probed) for site in sites}, run.declared_absent)


def headline_of(sites: Sites, absent: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The numbers to know first, of sites at one step; those that are not there are left out.

    ``absolute_maximum`` with ``absolute_maximum_site`` and ``absolute_maximum_layer``: the largest |x| of the
    residual stream. ``osp_excess_kurtosis`` with ``osp_excess_kurtosis_tensors``: the mean over the hidden
    states (:func:`hidden_states`) for all tokens, and how many those are.
    """
    numbers = _largest(sites)
    states = hidden_states(sites, absent).states
    kurtosis = mean_by_stratum(states).get("all")
    if kurtosis is not None:
        numbers |= {KURTOSIS: kurtosis, f"{KURTOSIS}_tensors": len(states)}
    return numbers


def _largest(sites: Sites) -> dict[str, Any]:
    peak: dict[str, Any] = {}
    for site in RESIDUAL_SITES:
        if "absolute_maximum" not in sites.get(site, ()):
            continue
        values = of_all_tokens(sites[site]["absolute_maximum"]).load()
        if values.dims != ("layer",) or not np.isfinite(values).any():
            continue
        largest = float(values.max())
        if largest > peak.get("absolute_maximum", -math.inf):
            peak = {
                "absolute_maximum": largest,
                "absolute_maximum_site": site,
                "absolute_maximum_layer": int(values["layer"].values[int(np.nanargmax(values.values))]),
            }
    return peak


def of_all_tokens(values: xr.DataArray) -> xr.DataArray:
    """The stratum ``all`` of a statistic that has strata; others as they are."""
    return values.sel(stratum="all") if "stratum" in values.coords else values
