"""How each head of a model makes its attention sink, step by step.

A sink key wins the softmax by the *gap* between its logit and those of other keys, and there is more than
one way to make a gap. Park et al. 2025 (Outlier-Safe Pre-Training, arXiv 2506.19697) tell two apart in
words: under Adam the other logits are pushed far below 0 ("negative infinity"), under OSP logits are
balanced around 0. Here every head gets numbers, and a class by stated thresholds (:class:`SinkRules`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.sinks.residual import residual_of_sink
from osp_diag.analyses.sinks.rotary_pairs import RotaryPairs, rotary_pairs
from osp_diag.analyses.sinks.rules import SinkRules
from osp_diag.errors import OspDiagError, StoreError, UsageError
from osp_diag.estimators.attention_tiles import LogitGrid
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of
from osp_diag.schema import ordinary_stratum

__all__ = ["KINDS", "logit_edges", "sink_emergence", "sink_implementation"]

KINDS = ("no sink", "negative infinity", "mixed", "balanced", "learned sink", "unclear", "not measured")
REQUIRED = ("sink_rate", "first_token_attention", "logit_density", "logit_quantile")
OPTIONAL = (
    "extra_sink_mass", "sink_logit_contribution", "sink_logit_channels_90", "query_key_channel_overlap",
    "sink_cosine", "sink_key_norm", "other_key_norm", "query_norm", "value_drain", "delta_logit",
)  # fmt: skip
DEFINITIONS = {
    "sink_rate": "share of sequences whose first token gets more than ε of the head's attention",
    "sink_mass": "mean attention to the first token, of ordinary queries (in text not first, no delimiters)",
    "learned_sink_mass": "mean attention to a learned sink or to softmax-off-by-one's 1",
    "kind": "how the gap between sink and other logits is made; thresholds in the attributes",
    "sink_logit": "median logit of the sink key",
    "other_logit": "median logit of all other keys",
    "logit_gap": "sink_logit − other_logit",
    "delta_logit": "mean over queries of the sink logit less the mean logit that the query sees",
    "negative_part": "part of the gap that lies below 0: −other_logit / logit_gap, within [0, 1]",
    "other_negative_share": "share of the other keys' logits below 0",
    "logit_skew": "(q95 + q5 − 2 q50) / (q95 − q5) of the logits: below 0, the longer tail is negative",
    "channel_use": "of sinks, concentrated or spread: whether few channels carry the sink key's logit",
    "channels_90": "smallest number of channels with 90% of Σ|c_j|, c_j the channel's part of q·k_sink",
    "channels_90_share": "channels_90 / head channels",
    "query_key_overlap": "Jaccard index of the largest channels of q and of k_sink",
    "query_key_overlap_chance": "what independent sets of channels overlap by",
    "geometry": "of sinks, the larger of alignment_factor and norm_factor; neither if none > 1 or cos ≤ 0",
    "sink_cosine": "mean cosine of queries and k_sink",
    "alignment_factor": "sink_cosine · √(head channels): 1 is what unrelated directions reach by chance",
    "norm_factor": "‖k_sink‖ / mean ‖k‖ of other keys",
    "query_norm": "mean ‖q‖ of the queries after the sink",
    "sink_logit_contribution": "mean over queries of scale · q_j · k_sink,j, by channel",
    "frequency_contribution": "the same by rotary frequency: the sum over its two channels; 0 is the fastest",
    "frequencies_90": "smallest number of frequencies with 90% of Σ|contribution|",
    "frequency_position": "mean place of the contribution: 0 at the fastest frequency, 1 at the slowest",
    "value_drain": "mean ‖v_sink‖ / mean ‖v‖, of the head's key-value head",
    "residual_spike": "RMS of the first token's state at the layer's input, over that of the rest",
    "residual_massive": "massive activations of the first token at the layer's input, per sequence",
    "emergence_step": "first probed step from which on the head sinks at every later one; NaN if never",
    "emergence_after": "the probed step before that, where it did not sink; NaN if it sank at the first",
}  # fmt: skip
UNITS = {
    "sink_logit": "logit", "other_logit": "logit", "logit_gap": "logit", "delta_logit": "logit",
    "sink_logit_contribution": "logit", "frequency_contribution": "logit", "channels_90": "channels",
    "frequencies_90": "frequencies", "emergence_step": "step", "emergence_after": "step",
    "query_norm": "activation", "residual_massive": "elements per sequence",
}  # fmt: skip


def sink_implementation(
    run: Run,
    *,
    steps: Sequence[int] | None = None,
    rules: SinkRules | None = None,
    rope_theta: float | None = None,
) -> xr.Dataset:
    """How each head makes its sink: evidence, and one class per head, layer and step.

    ``kind`` is ``no sink`` for heads below the rule's sink rate. Of the others it is ``negative infinity``
    if the part of the gap below 0 is at least ``rules.negative`` and at least ``rules.mostly`` of the other
    logits are negative, ``balanced`` if that part is at most ``rules.balanced``, else ``mixed``; ``unclear``
    if the median sink logit does not exceed that of the others. A head whose sink is a learned logit is a
    ``learned sink``. What a key at position 0 receives is a sink here; sinks elsewhere are not looked at.

    Parameters
    ----------
    run : an open run that holds the attention site
    steps : the probed steps to look at; all by default
    rules : the thresholds; by default those of :class:`SinkRules`
    rope_theta : base of the rotary frequencies; by default what the run's training configuration says. Only
        the coordinate ``wavelength`` (tokens per turn) needs it

    Returns
    -------
    A Dataset over (step, layer, head), every variable with the attribute ``definition``; evidence that the
    run lacks is NaN.

    Raises
    ------
    StoreError : the run holds no attention, or lacks a statistic that no head can be classified without
    UsageError : a step that was not probed, or a run of sequences of one token, which attend to nothing else
    """
    rules = SinkRules() if rules is None else rules
    probed = _steps(run, steps)
    attention = _attention(run, rules)
    pairs = rotary_pairs(run, probed[-1])
    parts = []
    for step in probed:
        at = attention.sel(step=step, drop=True).load()
        evidence = _evidence(at, pairs).merge(residual_of_sink(run, step, at["layer"].values))
        parts.append(
            _classified(evidence, rules, at.sizes["head_channel"] if "head_channel" in at.dims else 0)
        )
    heads = xr.concat(parts, dim=xr.DataArray(probed, dims="step", name="step"), combine_attrs="override")
    heads = heads.assign(_emergence(heads["sink_rate"], heads["learned_sink_mass"], rules))
    return _labelled(heads, run, rules, pairs, rope_theta)


def sink_emergence(run: Run, *, rules: SinkRules | None = None) -> xr.Dataset:
    """When each head becomes a sink: of :func:`sink_implementation` what needs no evidence, in one reading.

    Returns
    -------
    ``sink_rate`` (step, layer, head), ``emergence_step`` and ``emergence_after`` (layer, head)

    Raises
    ------
    StoreError, UsageError : as :func:`sink_implementation`
    """
    rules = SinkRules() if rules is None else rules
    _steps(run, None)
    names = ["sink_rate", "extra_sink_mass"]
    attention = _attention(run, rules)
    rates = attention[[name for name in names if name in attention]].transpose("step", "layer", "head").load()
    rate = rates["sink_rate"]
    emergence = xr.Dataset({"sink_rate": rate})
    learned = rates["extra_sink_mass"] if "extra_sink_mass" in rates else xr.full_like(rate, np.nan)
    emergence = emergence.assign(_emergence(rate, learned, rules))
    for name in emergence.data_vars:
        emergence[name].attrs = _attrs(str(name))
    return emergence


def logit_edges(centres: np.ndarray) -> np.ndarray:
    """The edges of the bins of ``logit_density`` from their centres, in logit units."""
    # The grid is even in asinh(logit), over (−top, top); its last centre lies half a bin below the top edge.
    bins = len(centres)
    top = math.asinh(float(centres[-1])) / (1 - 1 / bins)
    return LogitGrid(bins, math.sinh(top)).edges


def _steps(run: Run, steps: Sequence[int] | None) -> list[int]:
    step_of(run)  # refuses a run without any
    if steps is None:
        return [int(step) for step in run.steps]
    if not len(steps):
        raise UsageError("sink_implementation: steps is empty; leave it out for all")
    return sorted(step_of(run, int(step)) for step in steps)


def _attention(run: Run, rules: SinkRules) -> xr.Dataset:
    """The attention site's statistics, the sink rate at the rule's ε and at position 0."""
    if run.attrs.get("sequence_length") == 1:
        raise UsageError(
            f"the run of {model_name(run.attrs)} was probed under the protocol {run.attrs.get('protocol')}: "
            "every token is a sequence of its own and attends to itself alone, so there are no sinks; probe "
            "real sequences"
        )
    try:
        site = run.at("attention")
    except OspDiagError as reason:
        raise StoreError(f"sink_implementation looks at attention, and {reason}") from None
    absent_statistics = [name for name in REQUIRED if name not in site]
    if absent_statistics:
        raise StoreError(
            f"sink_implementation needs {', '.join(absent_statistics)} at the site 'attention', which the "
            f"run of {model_name(run.attrs)} does not hold; probe again with the estimator among --estimators"
        )
    statistics = site[[*REQUIRED, *(name for name in OPTIONAL if name in site)]]
    for dim, labels in (
        ("epsilon", [rules.epsilon]),
        ("quantile", [0.05, 0.5, 0.95]),
        ("sink_position", [0]),
    ):
        values = statistics[dim].values.astype(float)
        absent = [value for value in labels if np.abs(values - value).min() > 1e-9]
        if absent:
            raise StoreError(
                f"sink_implementation needs {dim} {', '.join(f'{v:g}' for v in absent)}, and the run of "
                f"{model_name(run.attrs)} has {', '.join(f'{v:g}' for v in values)}; "
                + ("give rules with an ε that it has" if dim == "epsilon" else "probe again with it")
            )
    # Position 0 is the first token that is not padding: docs/decisions.md, Estimators.
    at = int(np.argmin(np.abs(statistics["epsilon"].values - rules.epsilon)))
    return statistics.isel(epsilon=at, drop=True).sel(sink_position=0, drop=True)


def _evidence(at: xr.Dataset, pairs: RotaryPairs) -> xr.Dataset:
    """Everything that is measured of the heads at one step."""
    head = ("layer", "head")
    quantile = at["logit_quantile"].transpose(*head, "key_class", "quantile")
    # q5, q50 and q95 of the logits of each class of keys; the gap is what the sink key wins the softmax by.
    low, middle, high = (quantile.sel(quantile=q, method="nearest", drop=True) for q in (0.05, 0.5, 0.95))
    spread = high - low
    ordinary = ordinary_stratum(map(str, at["stratum"].values))
    sink, other = (middle.sel(key_class=name, drop=True) for name in ("sink", "other"))
    gap = sink - other
    evidence = xr.Dataset(
        {
            "sink_rate": at["sink_rate"].transpose(*head),
            "sink_mass": at["first_token_attention"].sel(stratum=ordinary, drop=True).transpose(*head),
            "sink_logit": sink,
            "other_logit": other,
            "logit_gap": gap,
            # Of the way from the other logits up to the sink's, the part below 0; 0 if both lie above it.
            "negative_part": (-other / gap.where(gap > 0)).clip(0, 1),
            "other_negative_share": _negative_share(at["logit_density"].sel(key_class="other", drop=True)),
            # Bowley's skewness, with the 5% and 95% quantiles in place of the quartiles.
            "logit_skew": (high + low - 2 * middle) / spread.where(spread > 0),
        }
    )
    blank = xr.full_like(sink, np.nan)
    for name, statistic in (
        ("learned_sink_mass", "extra_sink_mass"),
        ("delta_logit", "delta_logit"),
        ("channels_90", "sink_logit_channels_90"),
        ("query_key_overlap", "query_key_channel_overlap"),
        ("sink_cosine", "sink_cosine"),
        ("query_norm", "query_norm"),
    ):
        evidence[name] = at[statistic].transpose(*head) if statistic in at else blank
    has_norms = "sink_key_norm" in at and "other_key_norm" in at
    evidence["norm_factor"] = at["sink_key_norm"] / at["other_key_norm"] if has_norms else blank
    evidence["value_drain"] = _of_key_value_heads(at, blank)
    floor = (
        at["query_key_channel_overlap"].attrs.get("floor", np.nan)
        if "query_key_channel_overlap" in at
        else np.nan
    )
    evidence["query_key_overlap_chance"] = float(floor)
    if "sink_logit_contribution" in at:
        contribution = at["sink_logit_contribution"].transpose(*head, "head_channel")
        evidence["sink_logit_contribution"] = contribution
        _add_frequencies(evidence, contribution.values, pairs)
    return evidence


def _negative_share(density: xr.DataArray) -> xr.DataArray:
    # ∫ of the density over the bins that end at or below 0; one edge is 0, up to rounding.
    edges = logit_edges(density["logit_bin"].values)
    below = xr.DataArray(np.where(edges[1:] <= 1e-9, np.diff(edges), 0.0), dims="logit_bin")
    return (density * below).sum("logit_bin", skipna=False).transpose("layer", "head")


def _of_key_value_heads(at: xr.Dataset, blank: xr.DataArray) -> xr.DataArray:
    """Value drain repeated for the query heads that share a key-value head."""
    if "value_drain" not in at:
        return blank
    drain = at["value_drain"].transpose("layer", "key_value_head").values
    return blank.copy(data=np.repeat(drain, blank.sizes["head"] // drain.shape[1], axis=1))


def _add_frequencies(evidence: xr.Dataset, contribution: np.ndarray, pairs: RotaryPairs) -> None:
    """What each rotary frequency adds to the sink logit, how many are needed, and where they lie."""
    if not len(pairs.first):
        return
    # c_f, the part of q·k_sink that frequency f adds: the two channels of its pair together.
    values = pairs.summed(contribution)
    size = np.abs(values)
    total = size.sum(-1)
    safe = np.where(total > 0, total, np.nan)
    # The smallest n with Σ of the n largest |c_f| ≥ 0.9 Σ|c_f|: one more than there are sums that fall short.
    ordered = np.cumsum(-np.sort(-size, axis=-1), axis=-1)
    count = (ordered < 0.9 * ordered[..., -1:]).sum(-1) + 1.0
    # Σ|c_f| · place_f / Σ|c_f|, places from 0 (the fastest) to 1 (the slowest).
    place = np.arange(size.shape[-1]) / max(size.shape[-1] - 1, 1)
    head = ("layer", "head")
    evidence["frequency_contribution"] = ((*head, "frequency"), values)
    evidence["frequencies_90"] = (head, np.where(np.isfinite(safe), count, np.nan))
    evidence["frequency_position"] = (head, (size * place).sum(-1) / safe)


def _classified(evidence: xr.Dataset, rules: SinkRules, width: int) -> xr.Dataset:
    """One class per head, and the two that qualify it: channels, and alignment or norm."""
    rate = evidence["sink_rate"]
    sinks, learned = rate >= rules.sink_rate, evidence["learned_sink_mass"] >= rules.learned
    part = evidence["negative_part"]
    far = (part >= rules.negative) & (evidence["other_negative_share"] >= rules.mostly)
    # Each `where` keeps the class where its condition holds; later lines overrule earlier ones.
    kind = xr.full_like(rate, "mixed", dtype="<U20")
    kind = kind.where(~(part <= rules.balanced), "balanced").where(~far, "negative infinity")
    kind = kind.where(evidence["logit_gap"] > 0, "unclear").where(sinks, "no sink")
    kind = kind.where(sinks | ~learned, "learned sink").where(np.isfinite(rate), "not measured")
    share = evidence["channels_90"] / width if width else xr.full_like(rate, np.nan)
    use = xr.full_like(rate, "spread", dtype="<U20").where(share > rules.concentrated, "concentrated")
    # Cosines of unrelated directions in d channels have the standard deviation 1/√d.
    alignment = evidence["sink_cosine"] * math.sqrt(width)
    norm = evidence["norm_factor"]
    geometry = xr.full_like(rate, "alignment", dtype="<U20").where(alignment >= norm, "norm")
    helps = (np.maximum(alignment, norm) > 1) & (alignment > 0)
    has_geometry = np.isfinite(alignment) & np.isfinite(norm)
    use = use.where(np.isfinite(share), "not measured")
    geometry = geometry.where(helps, "neither").where(has_geometry, "not measured")
    # There is nothing to qualify where the first token is no sink.
    first = ~kind.isin(["no sink", "learned sink", "not measured"])
    return evidence.assign(
        kind=kind,
        channels_90_share=share,
        channel_use=use.where(first, kind),
        alignment_factor=alignment.where(has_geometry),
        geometry=geometry.where(first, kind),
    )


def _emergence(rate: xr.DataArray, learned: xr.DataArray, rules: SinkRules) -> dict[str, Any]:
    """The step from which on each head sinks for good, also by a learned logit, and the probe before it."""
    steps = rate["step"].values.astype(float)
    either = rate.notnull() & ((rate >= rules.sink_rate) | (learned >= rules.learned))
    sinks = either.transpose("step", "layer", "head").values
    # A head sinks for good at a step if it sinks there and at every later one: "and" taken from the end.
    lasting = np.logical_and.accumulate(sinks[::-1], axis=0)[::-1]
    first = lasting.argmax(axis=0)
    ever = lasting.any(axis=0)
    before = np.where(first > 0, steps[np.maximum(first - 1, 0)], np.nan)
    head = ("layer", "head")
    return {
        "emergence_step": (head, np.where(ever, steps[first], np.nan)),
        "emergence_after": (head, np.where(ever, before, np.nan)),
    }


def _attrs(name: str) -> dict[str, str]:
    return {"definition": DEFINITIONS[name], "units": UNITS.get(name, "1")}


def _labelled(
    heads: xr.Dataset, run: Run, rules: SinkRules, pairs: RotaryPairs, rope_theta: float | None
) -> xr.Dataset:
    for name in heads.data_vars:
        heads[name].attrs = _attrs(str(name))
    theta = rope_theta or (run.attrs.get("config") or {}).get("model.rope_theta")
    count = len(pairs.first)
    if count and "frequency" in heads.dims:
        heads = heads.assign_coords(frequency=np.arange(count))
        if theta:
            wavelength = 2 * np.pi * float(theta) ** (np.arange(count) / count)
            attrs = {"units": "tokens", "definition": "tokens per turn: 2π · θ^(frequency / frequencies)"}
            heads = heads.assign_coords(wavelength=("frequency", wavelength, attrs))
    copied = (
        "model_name",
        "protocol",
        "bos",
        "sequence_length",
        "tokens",
        "token_source",
        "dtype",
        "estimators",
    )
    heads.attrs = {key: run.attrs[key] for key in copied if key in run.attrs}
    heads.attrs |= {f"rule_{key}": value for key, value in asdict(rules).items()}
    heads.attrs |= {"rotary_layout": pairs.layout, "title": "How each head makes its attention sink"}
    return heads
