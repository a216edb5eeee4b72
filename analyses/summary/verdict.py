"""What is wrong with a model and where, by stated rules; or that nothing is.

Each rule compares one number of the run with a threshold and gives a :class:`Finding`: its state, a
sentence, and the place it speaks of. The numbers are those of :mod:`osp_diag.analyses.summary.summary`, the
onset that of :mod:`osp_diag.analyses.emergence.history`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.profiles import HOT, relative_rms
from osp_diag.analyses.in_notebook import in_notebook
from osp_diag.analyses.summary.few_bits import few_bits_sentence
from osp_diag.analyses.summary.rules import RULES, SINK_HEAD, STATES, State, judged
from osp_diag.analyses.summary.summary import Summary, summarise
from osp_diag.analyses.summary.text import carriers, not_measured
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.monitoring.limits import QK_CLIP
from osp_diag.runs.run import Run
from osp_diag.schema import HIDDEN_STATES, SINK_EPSILON, STRATA, stratum_words
from osp_diag.wording import number, of_stack

__all__ = ["Finding", "Verdict", "verdict"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule applied to one run. What does not apply is None or empty."""

    rule: str
    state: State
    text: str
    """a sentence with the numbers"""
    value: float | None = None
    site: str = ""
    layer: int | None = None
    channel: int | None = None
    head: int | None = None
    stratum: str = ""
    step: int | None = None

    @property
    def definition(self) -> str:
        """What the rule asks for."""
        return RULES[self.rule]


@dataclass(frozen=True)
class Verdict:
    """All findings on one run at one step."""

    summary: Summary
    findings: tuple[Finding, ...] = field(default_factory=tuple)

    @property
    def state(self) -> State:
        """The worst of the findings'."""
        states = {finding.state for finding in self.findings}
        return next((state for state in STATES if state in states), "unknown")

    @property
    def headline(self) -> str:
        """The same words as on the terminal."""
        return self.summary.verdict

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON knows."""
        return {
            "model": self.summary.model,
            **({"stack": self.summary.stack} if self.summary.stack else {}),
            "step": self.summary.step,
            "state": self.state,
            "headline": self.headline,
            "findings": [asdict(finding) | {"definition": finding.definition} for finding in self.findings],
            "notes": list(self.summary.notes),
            "absent_sites": dict(self.summary.absent_sites),
        }

    @property
    def caveats(self) -> tuple[str, ...]:
        """What was not measured, and what else the reader should know, one sentence each."""
        return (*not_measured(self.summary), *self.summary.notes)

    def _repr_html_(self) -> str:
        return in_notebook("\n".join([self.headline, *(finding.text for finding in self.findings)]))


def verdict(
    run: Run,
    *,
    step: int | None = None,
    onsets: xr.Dataset | None = None,
    sinks: xr.Dataset | None = None,
) -> Verdict:
    """The findings on a run at ``step``, the last one by default; the worst come first.

    Parameters
    ----------
    onsets : what :func:`osp_diag.analyses.emergence.history.onsets` returned; without it nothing is said of
        emergence
    sinks : what :func:`osp_diag.analyses.sinks.implementation.sink_implementation` returned; without it
        nothing is said of how heads make their sinks

    Raises
    ------
    UsageError, StoreError : as :func:`osp_diag.analyses.summary.summary.summarise`
    """
    summary = summarise(run, step=step)
    states = {rule: judgement.state for rule, judgement in judged(asdict(summary)).items()}
    findings = [
        _nonfinite(summary, states["nonfinite"]),
        _massive(summary, states["massive"]),
        _kurtosis(summary, states["kurtosis"], run),
        _everyday(summary, states["everyday"], run),
        _sinks(summary, states["sinks"], sinks),
        _logits(summary, states["logits"]),
    ]
    if summary.few_bits:  # which few runs hold: of others nothing is said
        findings.append(_few_bits(summary, states["few_bits"]))
    if onsets is not None:
        findings.append(_emergence(onsets))
    findings = [replace(finding, text=of_stack(finding.text, summary.stack)) for finding in findings]
    return Verdict(summary, tuple(sorted(findings, key=lambda finding: STATES.index(finding.state))))


def _nonfinite(summary: Summary, state: State) -> Finding:
    if summary.nonfinite_site:
        location = f"{summary.nonfinite_site}, layer {summary.nonfinite_layer}"
        if summary.nonfinite_token is not None:
            location += f", token {summary.nonfinite_token}, channel {summary.nonfinite_channel}"
        return Finding(
            rule="nonfinite",
            state=state,
            text=f"NaN or Inf in {summary.nonfinite_tokens:,} tokens, beginning at {location}; they are left "
            "out of every number here.",
            value=float(summary.nonfinite_tokens),
            site=summary.nonfinite_site,
            layer=summary.nonfinite_layer,
            channel=summary.nonfinite_channel,
        )
    if state == "unknown":
        return Finding(rule="nonfinite", state=state, text="NaN and Inf were not counted.")
    return Finding(rule="nonfinite", state=state, text="All activations are finite.", value=0.0)


def _massive(summary: Summary, state: State) -> Finding:
    if state == "unknown":
        return Finding(rule="massive", state=state, text="Massive activations were not counted.")
    peak = ""
    if summary.largest_magnitude is not None:
        channel = f", channel {summary.largest_channel}" if summary.largest_channel is not None else ""
        peak = (
            f"Largest |x|: {number(summary.largest_magnitude)}, at {summary.largest_site}, layer "
            f"{summary.largest_layer}{channel}."
        )
    place: dict[str, Any] = {
        "site": summary.largest_site,
        "layer": summary.largest_layer,
        "channel": summary.largest_channel,
    }
    if summary.massive_emergence_layer is None:
        text = f"No massive activations. {peak}".strip()
        return Finding(rule="massive", state=state, text=text, value=0.0, **place)
    channels = ", ".join(map(str, summary.massive_channels))
    channel_words = f", channel{'s' * (len(summary.massive_channels) > 1)} {channels}" if channels else ""
    first, last = summary.massive_emergence_layer, summary.massive_last_layer
    text = (
        f"Massive activations in layers {first} to {last}{channel_words}: "
        f"{number(summary.massive_per_sequence or 0)} a sequence, {carriers(summary)}. {peak}"
    ).strip()
    most = max(summary.massive_by_stratum, key=summary.massive_by_stratum.__getitem__, default="all")
    has_most = most in summary.massive_by_stratum and summary.massive_by_stratum[most] >= 0.5
    place["stratum"] = most if has_most and most not in ("delimiter", summary.ordinary_stratum) else "all"
    return Finding(rule="massive", state=state, text=text, value=summary.massive_per_sequence, **place)


def _kurtosis(summary: Summary, state: State, run: Run) -> Finding:
    if summary.osp_kurtosis is None or summary.osp_kurtosis_over_floor is None or summary.width is None:
        missing = "not measured" if summary.osp_kurtosis is None else "the run does not say the model's width"
        reason = summary.note or missing
        return Finding(rule="kurtosis", state=state, text=f"OSP kurtosis: {reason}.")
    over = summary.osp_kurtosis_over_floor
    text = (
        f"OSP kurtosis {number(summary.osp_kurtosis)}: {number(over)} times its Gaussian floor "
        f"({number(gaussian_floor(summary.width))}), "
        f"{summary.osp_kurtosis_of_ceiling or 0:.1%} of its ceiling."
    )
    highest = _highest(run, summary.step)
    place: dict[str, Any] = {}
    if highest is not None:
        value, site, layer, stratum = highest
        place = {"site": site, "layer": layer, "stratum": stratum}
        text += f" Highest at {site}, layer {layer}, on {_tokens(stratum)}: {number(value)}."
    return Finding(rule="kurtosis", state=state, text=text, value=over, **place)


def _tokens(stratum: str) -> str:
    """A stratum within a sentence."""
    return (
        f"the {stratum_words(stratum)}"
        if stratum in ("first", "cls", "distillation")
        else stratum_words(stratum)
    )


def _highest(run: Run, step: int) -> tuple[float, str, int, str] | None:
    """The largest kurtosis of the hidden states: value, site, layer, stratum."""
    peaks = []
    for site in HIDDEN_STATES:
        if site not in run.sites or "osp_excess_kurtosis" not in run.at(site):
            continue
        values = run.at(site)["osp_excess_kurtosis"].sel(step=step).load()
        # What is largest over all tokens is reported for the stratum that makes it so.
        by_stratum = values.sel(stratum=[name for name in values["stratum"].values if name != "all"])
        if bool(np.isfinite(by_stratum).any()):
            at = by_stratum.isel(by_stratum.argmax(...))
            peaks.append((float(at), site, int(at["layer"]), str(at["stratum"].item())))
    return max(peaks, default=None)


def _everyday(summary: Summary, state: State, run: Run) -> Finding:
    if summary.everyday_kurtosis is None:
        text = f"There are no {_ordinary_tokens(summary)}, or their kurtosis was not measured."
        return Finding(rule="everyday", state=state, text=text)
    value = number(summary.everyday_kurtosis)
    text = f"On {_ordinary_tokens(summary)}, OSP kurtosis is {value}"
    if summary.everyday_max_median_ratio is not None:
        text += f" and the largest channel {number(summary.everyday_max_median_ratio)} times the median one"
    place: dict[str, Any] = {"stratum": summary.ordinary_stratum}
    hottest = _hottest(run, summary.step, summary.ordinary_stratum)
    if hottest is not None:
        ratio, layer, channel = hottest
        place |= {"site": "residual_post", "layer": layer, "channel": channel}
        hot = "hottest" if ratio >= HOT else "largest, though not hot"
        text += f"; {hot}: channel {channel} of layer {layer}, {number(ratio)} times the median channel"
    return Finding(
        rule="everyday",
        state=state,
        text=f"{text}.",
        value=summary.everyday_kurtosis,
        **place,
    )


def _ordinary_tokens(summary: Summary) -> str:
    """Those that nothing sets apart, within a sentence."""
    if summary.ordinary_stratum != "rest":
        return stratum_words(summary.ordinary_stratum)
    kinds = set(summary.osp_kurtosis_by_stratum) - set(STRATA)
    others = "".join(f" nor {stratum_words(kind)}" for kind in sorted(kinds))
    return f"tokens that are neither first nor delimiters{others}"


def _hottest(run: Run, step: int, stratum: str) -> tuple[float, int, int] | None:
    """The channel of block outputs of largest RMS on ordinary tokens, over its layer's median channel."""
    if "residual_post" not in run.sites or "channel_rms" not in run.at("residual_post"):
        return None
    rms = run.at("residual_post")["channel_rms"].sel(step=step, stratum=stratum)
    rms = rms.transpose("layer", "channel")
    ratio = relative_rms(rms.values.astype(np.float64))
    if not np.isfinite(ratio).any():
        return None
    # Relative to the median channel of the layer, as everywhere: docs/decisions.md, Analyses.
    row, channel = np.unravel_index(int(np.nanargmax(ratio)), ratio.shape)
    return float(ratio[row, channel]), int(rms["layer"].values[row]), int(rms["channel"].values[channel])


def _sinks(summary: Summary, state: State, sinks: xr.Dataset | None) -> Finding:
    if summary.sequence_length == 1:
        text = "Sequences of one token attend to nothing but themselves, so there are no sinks to speak of."
        return Finding(rule="sinks", state=state, text=text)
    if summary.sink_rate is None:
        return Finding(rule="sinks", state=state, text="Attention sinks were not measured.")
    text = (
        f"Sink rate {summary.sink_rate:.1%}: {summary.sink_heads} of {summary.heads} heads give the first "
        f"token more than {SINK_EPSILON:g} of their attention in at least {SINK_HEAD:.0%} of the sequences"
    )
    if summary.first_token_attention is not None:
        text += f"; it receives {summary.first_token_attention:.1%} of all attention"
    text += _kinds(summary.step, sinks)
    return Finding(rule="sinks", state=state, text=f"{text}.", value=summary.sink_rate, site="attention")


def _kinds(step: int, sinks: xr.Dataset | None) -> str:
    """How many heads make their sink in which way, the most frequent first."""
    if sinks is None or step not in sinks["step"].values:
        return ""
    kinds, counts = np.unique(sinks["kind"].sel(step=step).values, return_counts=True)
    sink_kinds = [(int(count), str(kind)) for kind, count in zip(kinds, counts, strict=True)]
    sink_kinds = [
        pair for pair in sorted(sink_kinds, reverse=True) if pair[1] not in ("no sink", "not measured")
    ]
    return (
        f". Their logits: {', '.join(f'{kind} {count}' for count, kind in sink_kinds)}" if sink_kinds else ""
    )


def _logits(summary: Summary, state: State) -> Finding:
    if summary.largest_logit is None:
        return Finding(rule="logits", state=state, text="Attention logits were not measured.")
    above = summary.heads_above_qk_clip or 0
    text = (
        f"Largest attention logit {number(summary.largest_logit)}, layer {summary.largest_logit_layer}, head "
        f"{summary.largest_logit_head}"
    )
    text += f"; {above} head{'s' * (above != 1)} above {QK_CLIP:g}." if above else f"; below {QK_CLIP:g}."
    return Finding(
        rule="logits",
        state=state,
        text=text,
        value=summary.largest_logit,
        site="attention",
        layer=summary.largest_logit_layer,
        head=summary.largest_logit_head,
    )


def _few_bits(summary: Summary, state: State) -> Finding:
    text = f"{few_bits_sentence(summary.few_bits)}."
    return Finding(rule="few_bits", state=state, text=text, value=summary.few_bits["ratio"])


def _emergence(onsets: xr.Dataset) -> Finding:
    """The first block output that leaves the noise and is still above it at the last probe."""
    if "residual_post" not in onsets["site"].values:
        return Finding(rule="emergence", state="unknown", text="Block outputs were not probed over training.")
    part = onsets.sel(site="residual_post")
    strata = [str(name) for name in part["stratum"].values if name != "all"]
    part = part.sel(stratum=strata).transpose("layer", "stratum")
    # Outliers that go away again are no finding: an onset counts where y is above the departure at the end.
    onset = np.where(part["raised_at_end"].values, part["onset"].values, np.nan)
    outputs = int((part["state"] != "").any("stratum").sum())
    if not np.isfinite(onset).any():
        text = f"None of {outputs} block outputs leaves the noise for good while the model trains."
        return Finding(rule="emergence", state="clear", text=text)
    row, column = np.unravel_index(int(np.nanargmin(onset)), onset.shape)
    at = part.isel(layer=int(row), stratum=int(column))
    layer, stratum = int(at["layer"]), str(at["stratum"].item())
    low, high = (float(at[f"onset_{end}"]) for end in ("low", "high"))
    departed = int(np.isfinite(onset).any(axis=1).sum())
    text = (
        f"Outliers emerge at step {onset[row, column]:,.0f} ({low:,.0f} to {high:,.0f}), first at the output "
        f"of layer {layer} on {_tokens(stratum)}; {departed} of {outputs} block outputs leave "
        "the noise for good"
    )
    doubling = float(at["doubling_time"])
    if math.isfinite(doubling):
        text += f"; there kurtosis doubles every {number(doubling)} steps"
    return Finding(
        rule="emergence",
        state="raised",
        text=f"{text}.",
        value=float(onset[row, column]),
        site="residual_post",
        layer=layer,
        stratum=stratum,
        step=int(onset[row, column]),
    )
