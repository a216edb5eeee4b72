"""What a model's sinks are made of, in a few sentences with numbers instead of words.

Park et al. 2025 say of Adam: massive activations in the residual stream; large q and k channels overlap,
and most logits are negative. Of OSP: no massive activations, sinks all the same; q and k magnitudes are
spread, and logits lie balanced around zero. Each sentence here holds the numbers of one of these claims.
"""

from __future__ import annotations

import textwrap

import numpy as np
import xarray as xr

from osp_diag.errors import UsageError
from osp_diag.runs.naming import model_name
from osp_diag.wording import number

__all__ = ["sink_statement"]

_WIDTH = 100


def sink_statement(implementation: xr.Dataset, *, step: int | None = None) -> str:
    """The statement on a model at ``step`` (by default the last) from what ``sink_implementation`` returned.

    Numbers of heads are medians over the sink heads unless they count something.

    Raises
    ------
    UsageError : ``implementation`` has no such step
    """
    steps = [int(value) for value in implementation["step"].values]
    probed = steps[-1] if step is None else step
    if probed not in steps:
        raise UsageError(
            f"sink_statement: there is no step {probed}; there are {', '.join(map(str, steps[:8]))}"
        )
    at = implementation.sel(step=probed)
    kinds = at["kind"].transpose("layer", "head").values
    sinks = ~np.isin(kinds, ["no sink", "learned sink", "not measured"])
    sentences = [_heads(at, kinds, sinks, probed)]
    if (kinds == "learned sink").any():
        mass = at["learned_sink_mass"].values[kinds == "learned sink"].mean()
        count = int((kinds == "learned sink").sum())
        sentences.append(f"Learned sinks: {count} heads give theirs {mass:.0%} of their attention.")
    if sinks.any():
        parts = (_logits, _channels, _geometry, _frequencies, _value, _residual)
        sentences += [text for part in parts if (text := part(at, kinds, sinks))]
        sentences.append(_emergence(implementation, sinks))
    wrapped = [textwrap.fill(text, _WIDTH, subsequent_indent="  ") for text in sentences if text]
    return "\n".join(wrapped)


def _median(at: xr.Dataset, name: str, sinks: np.ndarray) -> float:
    """Over the sink heads; NaN where it was not measured."""
    if name not in at:
        return float("nan")
    # Transposed, so that a variable of layers alone is repeated over heads and not the other way round.
    values = np.broadcast_to(at[name].values.T, sinks.T.shape).T[sinks]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else float("nan")


def _heads(at: xr.Dataset, kinds: np.ndarray, sinks: np.ndarray, step: int) -> str:
    attrs = at.attrs
    measured = int((kinds != "not measured").sum())
    rate = at["sink_rate"].transpose("layer", "head")
    sentence = (
        f"{model_name(attrs)}, step {step:,}: {int(sinks.sum())} of {measured} heads "
        f"sink on the first token, that is, give it more than {attrs['rule_epsilon']:g} of their attention "
        f"in at least {attrs['rule_sink_rate']:.0%} of the sequences (of "
        f"{attrs.get('sequence_length', 'unknown')} tokens, BOS {attrs.get('bos', 'unknown')})"
    )
    if sinks.any():
        return f"{sentence}; it receives {_median(at, 'sink_mass', sinks):.0%} of what other tokens give."
    if not measured:
        return f"{sentence}: none was measured."
    row, head = np.unravel_index(int(np.nanargmax(rate.values)), rate.shape)
    return (
        f"{sentence}. The highest sink rate is {float(rate.values[row, head]):.0%} (layer "
        f"{int(rate['layer'].values[row])}, head {head}), so there is no sink to explain."
    )


def _logits(at: xr.Dataset, kinds: np.ndarray, sinks: np.ndarray) -> str:
    counts = [
        f"{count} {name}"
        for name in ("negative infinity", "mixed", "balanced", "unclear")
        if (count := int((kinds == name).sum()))
    ]
    sink, others = _median(at, "sink_logit", sinks), _median(at, "other_logit", sinks)
    # Rounded, plus 0.0 below: a small negative skew would read "−0.00".
    skew = at["logit_skew"].sel(key_class="other").transpose("layer", "head").values[sinks]
    return (
        f"Logits: {', '.join(counts)}. The sink key's lie at {sink:+.3g}, the others' at {others:+.3g}; "
        f"{_median(at, 'other_negative_share', sinks):.0%} of the others' are negative, their skew is "
        f"{round(float(np.nanmedian(skew)), 2) + 0.0:+.2f}; {_median(at, 'negative_part', sinks):.0%} of the "
        "gap lies below zero."
    )


def _channels(at: xr.Dataset, kinds: np.ndarray, sinks: np.ndarray) -> str:
    use = at["channel_use"].transpose("layer", "head").values[sinks]
    count = _median(at, "channels_90", sinks)
    if not np.isfinite(count) or "head_channel" not in at.dims:
        return ""
    sentence = (
        f"Channels: {number(count)} of {at.sizes['head_channel']} carry 90% of the sink key's logit; "
        f"concentrated in {int((use == 'concentrated').sum())} heads, "
        f"spread in {int((use == 'spread').sum())}"
    )
    overlap, chance = _median(at, "query_key_overlap", sinks), float(at["query_key_overlap_chance"])
    if np.isfinite(overlap):
        sentence += f"; the largest channels of q and k_sink overlap by {overlap:.2f} (chance: {chance:.2f})"
    return f"{sentence}."


def _geometry(at: xr.Dataset, kinds: np.ndarray, sinks: np.ndarray) -> str:
    geometry = at["geometry"].transpose("layer", "head").values[sinks]
    names = [
        f"{count} by {name}" for name in ("alignment", "norm") if (count := int((geometry == name).sum()))
    ]
    neither = int((geometry == "neither").sum())
    names += [f"{neither} by neither"] if neither else []
    if not names:
        return ""
    return (
        f"Alignment or norm: {', '.join(names)}; the cosine of q and k_sink is "
        f"{_median(at, 'sink_cosine', sinks):.2f}, {_median(at, 'alignment_factor', sinks):.2g} times what "
        f"unrelated directions reach; ‖k_sink‖ is {_median(at, 'norm_factor', sinks):.2g} times that of "
        "other keys."
    )


def _frequencies(at: xr.Dataset, kinds: np.ndarray, sinks: np.ndarray) -> str:
    count = _median(at, "frequencies_90", sinks)
    if not np.isfinite(count):
        return ""
    return (
        f"Rotary frequencies: {number(count)} of {at.sizes['frequency']} carry 90% of the sink key's logit, "
        f"around place {_median(at, 'frequency_position', sinks):.2f} (0: the fastest, 1: the slowest)."
    )


def _value(at: xr.Dataset, kinds: np.ndarray, sinks: np.ndarray) -> str:
    drain, line = at["value_drain"].transpose("layer", "head").values[sinks], at.attrs["rule_drained"]
    if not np.isfinite(drain).any():
        return ""
    return (
        f"Value drain: ‖v_sink‖ is {float(np.nanmedian(drain)):.2g} times the mean ‖v‖, below {line:g} in "
        f"{int((drain < line).sum())} of {drain.size} sink heads."
    )


def _residual(at: xr.Dataset, kinds: np.ndarray, sinks: np.ndarray) -> str:
    massive = np.broadcast_to(at["residual_massive"].values[:, None], sinks.shape)[sinks]
    spike = _median(at, "residual_spike", sinks)
    if not np.isfinite(massive).any():
        return ""
    sentence = (
        f"Residual stream: {int((massive > 0).sum())} of {massive.size} sink heads read a massive activation "
        "of the first token"
    )
    ratio = f"; its state is {number(spike)} times as large as that of ordinary tokens"
    return f"{sentence}{ratio if np.isfinite(spike) else ''}."


def _emergence(implementation: xr.Dataset, sinks: np.ndarray) -> str:
    if implementation.sizes["step"] == 1:
        return ""
    first = implementation["emergence_step"].transpose("layer", "head").values
    before = implementation["emergence_after"].transpose("layer", "head").values
    if not np.isfinite(first).any():
        return ""
    row, head = np.unravel_index(int(np.nanargmin(first)), first.shape)
    when = f"at step {int(first[row, head]):,}"
    if np.isfinite(before[row, head]):
        when = f"between steps {int(before[row, head]):,} and {int(first[row, head]):,}"
    layer = int(implementation["layer"].values[row])
    median = number(float(np.nanmedian(first)))
    return (
        f"Emergence: the first lasting sink is layer {layer}, head {head}, {when}; the median head that "
        f"sinks for good does so from step {median} on."
    )
