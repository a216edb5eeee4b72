"""The numbers of a summary: which layers, heads and strata of a run's statistics it looks at.

Most functions take the run's sites at one step (site → Dataset) and return fields of
:class:`osp_diag.analyses.summary.summary.Summary`; a field is left out where the run does not hold its
statistic. :func:`hidden_state_kurtosis` and :func:`sink_rates` take a run, and go over its steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from osp_diag.analyses.summary.rules import SINK_HEAD
from osp_diag.errors import MissingError
from osp_diag.estimators.magnitude_outliers import outlier_features
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.monitoring.limits import QK_CLIP
from osp_diag.runs.headline import hidden_states, mean_by_stratum
from osp_diag.schema import (
    ATTENTION,
    CROSS_ATTENTION,
    HIDDEN_STATES,
    KURTOSIS,
    SINK_EPSILON,
    SINK_POSITION,
    network_order,
    ordinary_stratum,
)

if TYPE_CHECKING:
    from osp_diag.runs.run import Run

JUMP = 5.0
"""Factor between the largest |x| of two consecutive blocks from which on it is called a jump."""

__all__ = [
    "everyday",
    "hidden_state_kurtosis",
    "kurtosis",
    "largest",
    "massive",
    "nonfinite",
    "sink_rate_at",
    "sink_rates",
    "sinks",
]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# -- kurtosis --------------------------------------------------------------------------------------------


def kurtosis(
    sites: Mapping[str, xr.Dataset], width: int | None, absent: Mapping[str, str] | None
) -> dict[str, Any]:
    """The headline number, its normalised forms and its parts by stratum."""
    # Why a mean with a part missing is none: docs/decisions.md, The house.
    states, note = hidden_states(sites, absent)
    parts = mean_by_stratum(states)
    ordinary = ordinary_stratum(map(str, states[0]["stratum"].values)) if states else "rest"
    headline = parts.get("all")
    if states and headline is None:
        unknown = sum(not np.isfinite(state.sel(stratum="all").values).any() for state in states)
        note = f"not measured, because {unknown} of {len(states)} hidden states have no finite token"
    fields: dict[str, Any] = {
        "width": width,
        "hidden_states": len(states),
        "osp_kurtosis": headline,
        "osp_kurtosis_by_stratum": parts,
        "osp_kurtosis_of_ceiling": None,
        "osp_kurtosis_over_floor": None,
        "ordinary_stratum": ordinary,
        "everyday_kurtosis": parts.get(ordinary),
        "note": note,
    }
    if headline is not None and width is not None and width > 3:
        fields["osp_kurtosis_of_ceiling"] = headline / (width - 3)
        fields["osp_kurtosis_over_floor"] = headline / gaussian_floor(width)
    return fields


def hidden_state_kurtosis(run: Run) -> xr.DataArray | None:
    """The OSP kurtosis of every hidden state by step, over all tokens; None where there is none.

    These are the states of which the headline number is the mean
    (:func:`osp_diag.runs.headline.hidden_states`) and the last block's output, in place of which the OSP
    script takes the final norm's: where it goes wrong, a training goes wrong. One that was not measured is
    left out.

    Returns
    -------
    (hidden_state, step), with ``site``, ``layer`` and ``floor`` (what Gaussian noise of that width scores)
    along hidden_state: the embedding, the output of every block, the final norm
    """
    width = run.attrs.get("hidden_size")
    states: list[np.ndarray] = []
    places: list[tuple[str, str, int, float]] = []
    for site in HIDDEN_STATES:
        if KURTOSIS not in run.statistics_at(site):
            continue
        values = run.values(site, KURTOSIS, {"stratum": "all"})
        floor = values.attrs.get("floor") or (gaussian_floor(int(width)) if width else np.nan)
        for index, layer in enumerate(values["layer"].values):
            label = f"layer {layer}" if site == "residual_post" else site.replace("_", " ")
            places.append((label, site, int(layer), float(floor)))
            states.append(values.values[:, index])
    if not states:
        return None
    shortest = min(len(state) for state in states)  # of a run with a damaged chunk
    labels, sites, layers, floors = (list(part) for part in zip(*places, strict=True))
    return xr.DataArray(
        np.stack([state[:shortest] for state in states]),
        dims=("hidden_state", "step"),
        coords={
            "hidden_state": labels,
            "step": run.steps[:shortest],
            "site": ("hidden_state", sites),
            "layer": ("hidden_state", layers),
            "floor": ("hidden_state", floors),
        },
        attrs={"units": "1", "estimator": "osp_excess_kurtosis/1", "definition": "mean over all tokens"},
    )


# -- magnitudes ------------------------------------------------------------------------------------------


def massive(sites: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Where massive activations appear, at block outputs."""
    blocks = sites.get("residual_post")
    if blocks is None:
        return {}
    fields: dict[str, Any] = {}
    if "massive_activation_count" in blocks:
        count = blocks["massive_activation_count"].sortby("layer").load()
        # (layer): mean number in a sequence, over all strata.
        counted = count.sel(stratum="all").values
        if not np.isfinite(counted).any():
            return {}
        everywhere = np.nan_to_num(counted)
        present = np.flatnonzero(everywhere > 0)
        fields["massive_per_sequence"] = float(everywhere.max(initial=0.0))
        if present.size:
            fields["massive_emergence_layer"] = int(count["layer"].values[present[0]])
            fields["massive_last_layer"] = int(count["layer"].values[present[-1]])
            fields["massive_by_stratum"] = shares = _massive_shares(count, present)
            fields["massive_on_first"] = shares.get("first")
            fields["massive_channels"] = _massive_channels(blocks)
    if "top_magnitude" in blocks:
        top = blocks["top_magnitude"].sel(rank=1).sortby("layer").load()
        fields |= _jump(top.sel(stratum="all") if "stratum" in top.dims else top)
    return fields


def _massive_channels(blocks: xr.Dataset, limit: int = 8) -> tuple[int, ...]:
    """Channels with massive activations, most frequent first."""
    if "massive_activation_channel_count" not in blocks:
        return ()
    per_channel = blocks["massive_activation_channel_count"].sum("layer").values
    order = np.argsort(-per_channel, kind="stable")[:limit]
    return tuple(int(channel) for channel in order if per_channel[channel] > 0)


def _jump(top: xr.DataArray) -> dict[str, Any]:
    values = top.values
    if values.size < 2 or not (values[:-1] > 0).all():
        return {}
    # max|x| of block i + 1 over that of block i.
    factors = values[1:] / values[:-1]
    largest = int(np.nanargmax(factors)) if np.isfinite(factors).any() else 0
    if not factors[largest] >= JUMP:
        return {}
    return {"jump_layer": int(top["layer"].values[largest + 1]), "jump_factor": float(factors[largest])}


def largest(sites: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """The largest |x| of any site, and its channel where the run says so."""
    peaks = {
        (site, int(layer)): float(value)
        for site, dataset in sites.items()
        if "absolute_maximum" in dataset
        for layer, value in _of_all(dataset["absolute_maximum"])
        if math.isfinite(value)
    }
    if not peaks:
        return {}
    highest = max(peaks.values())
    site, layer = next(place for place in network_order(peaks) if peaks[place] == highest)
    fields: dict[str, Any] = {"largest_magnitude": highest, "largest_site": site, "largest_layer": layer}
    if "channel_absolute_maximum" in sites[site]:
        channels = sites[site]["channel_absolute_maximum"].sel(layer=layer, stratum="all").values
        if np.isfinite(channels).any():
            fields["largest_channel"] = int(np.nanargmax(channels))
    return fields


def _massive_shares(count: xr.DataArray, present: np.ndarray) -> dict[str, float]:
    """Share of all massive activations in each stratum, in the layers ``present`` that have any."""
    # A count is a mean over the sequences that have such a token: of fewer than all it would be too large.
    whole = np.nan_to_num(count.sel(stratum="all").values)[present].sum()
    parts = {
        str(name): np.nan_to_num(count.sel(stratum=name).values)[present].sum()
        for name in count["stratum"].values
        if name != "all"
    }
    return {name: float(min(part / whole, 1.0)) for name, part in parts.items()}


def _of_all(values: xr.DataArray) -> list[tuple[int, float]]:
    by_layer = (values.sel(stratum="all") if "stratum" in values.dims else values).load()
    return [
        (int(layer), float(value))
        for layer, value in zip(by_layer["layer"].values, by_layer.values, strict=True)
    ]


def everyday(sites: Mapping[str, xr.Dataset], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Outliers on ordinary tokens; on all tokens where every token is a first one."""
    has_ordinary = fields["everyday_kurtosis"] is not None or not fields["osp_kurtosis_by_stratum"]
    stratum = fields["ordinary_stratum"] if has_ordinary else "all"
    features = {}
    for site in ("attention_input", "mlp_input"):
        if site in sites and "outlier_feature_fraction" in sites[site]:
            fraction = (
                sites[site]["outlier_feature_fraction"].sel(stratum=stratum).transpose("layer", "channel")
            )
            if not np.isfinite(fraction.values).any():
                continue
            rule = outlier_features(np.nan_to_num(fraction.values.astype(np.float64)))
            features[site] = tuple(int(channel) for channel in np.flatnonzero(rule))
    ratio = None
    blocks = sites.get("residual_post")
    if blocks is not None and "max_median_ratio" in blocks:
        ratio = _finite(float(blocks["max_median_ratio"].sel(stratum=stratum).mean("layer")))
    return {"outlier_feature_channels": features, "everyday_max_median_ratio": ratio}


# -- attention -------------------------------------------------------------------------------------------


def sinks(sites: Mapping[str, xr.Dataset], site: str = ATTENTION) -> dict[str, Any]:
    """Sink rate, sink heads, attention to the first token, and the largest logit, of ``site``."""
    attention = sites.get(site)
    if attention is None:
        return {}
    fields: dict[str, Any] = {}
    if "sink_rate" in attention:
        rate = sink_rate_at(attention["sink_rate"])
        if rate is not None and np.isfinite(rate.values).any():
            values = rate.values[np.isfinite(rate.values)]
            fields |= {
                "sink_rate": float(values.mean()),
                "sink_heads": int((values >= SINK_HEAD).sum()),
                "heads": int(values.size),
            }
    if "first_token_attention" in attention:
        fields["first_token_attention"] = _finite(
            float(attention["first_token_attention"].sel(stratum="all").mean(skipna=True))
        )
    if "max_logit" in attention:
        logits = attention["max_logit"].transpose("layer", "head").load()
        if np.isfinite(logits.values).any():
            row, head = np.unravel_index(int(np.nanargmax(_masked(logits.values))), logits.shape)
            fields |= {
                "largest_logit": float(logits.values[row, head]),
                "largest_logit_layer": int(logits["layer"].values[row]),
                "largest_logit_head": int(head),
                "heads_above_qk_clip": int((logits.values > QK_CLIP).sum()),
            }
    return fields


def sink_rate_at(
    rates: xr.DataArray, epsilon: float = SINK_EPSILON, position: int = SINK_POSITION
) -> xr.DataArray | None:
    """The sink rate at one threshold and position, without these dimensions; None: not measured there."""
    if "sink_position" in rates.dims:
        if position not in rates["sink_position"].values:
            return None
        rates = rates.sel(sink_position=position, drop=True)
    if "epsilon" in rates.dims:
        places = np.flatnonzero(np.isclose(rates["epsilon"].values, epsilon, rtol=0, atol=1e-9))
        if not places.size:
            return None
        rates = rates.isel(epsilon=int(places[0]), drop=True)
    return rates


def sink_rates(run: Run) -> xr.DataArray | None:
    """:func:`sink_rate_at` over the steps (layer, step), mean over heads; None where there is none."""
    dims = run.statistics_at("attention").get("sink_rate")
    if dims is None:
        return None
    at = {"epsilon": SINK_EPSILON, "sink_position": SINK_POSITION}
    try:
        select = {dim: label for dim, label in at.items() if dim in dims}
        rates = run.values("attention", "sink_rate", select, ("head",))
    except MissingError:  # probed with other thresholds
        return None
    return rates.transpose("layer", "step").assign_attrs(epsilon=SINK_EPSILON)


def _masked(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


# -- what is no number -----------------------------------------------------------------------------------


def nonfinite(sites: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """The first site in network order that holds a NaN or Inf."""
    # Such tokens are in no average, so they are counted: docs/decisions.md, Estimators.
    counts: dict[tuple[str, int], float] = {}
    counted = False
    for site, dataset in sites.items():
        name = (
            "nonfinite_query_key_tokens" if site in (ATTENTION, CROSS_ATTENTION) else "nonfinite_token_count"
        )
        if name in dataset:
            counted = True
            counts |= {(site, layer): value for layer, value in _of_all(dataset[name]) if value > 0}
    if not counts:
        return {"nonfinite_counted": counted}
    site, layer = network_order(counts)[0]
    fields: dict[str, Any] = {
        "nonfinite_counted": True,
        "nonfinite_tokens": int(max(counts.values())),
        "nonfinite_site": site,
        "nonfinite_layer": layer,
    }
    for key, name in (
        ("nonfinite_token", "nonfinite_first_token"),
        ("nonfinite_channel", "nonfinite_first_channel"),
    ):
        if name in sites[site]:
            value = float(sites[site][name].sel(layer=layer))
            fields[key] = int(value) if math.isfinite(value) else None
    return fields
