"""A summary in plain words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from osp_diag.analyses.summary.few_bits import few_bits_sentence
from osp_diag.analyses.summary.tasks import task_sentences
from osp_diag.schema import stratum_words
from osp_diag.wording import number, of_stack

if TYPE_CHECKING:
    from osp_diag.analyses.summary.summary import Summary

__all__ = ["not_measured", "text_of"]

_WIDTH = 100


def text_of(summary: Summary) -> str:
    """The verdict first, then one paragraph a question."""
    paragraphs = [of_stack(line, summary.stack) for line in _paragraphs(summary)]
    lines = [_opening(summary), "", f"Verdict: {summary.verdict}.", "", *paragraphs, *_notes(summary)]
    return "\n".join(
        textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in lines
    )


def _opening(summary: Summary) -> str:
    parts = [f"{summary.model}, {summary.stack}" if summary.stack else summary.model]
    if summary.tokens is not None:
        tokens = f"{summary.tokens:,} tokens"
        if summary.sequence_length is not None:
            tokens += f" in sequences of {summary.sequence_length:,}"
        parts.append(f"{tokens} ({summary.token_source})" if summary.token_source else tokens)
    parts += [f"protocol {summary.protocol}", f"BOS {summary.bos}", summary.dtype]
    return ", ".join(parts if summary.step == 0 else [*parts, f"step {summary.step:,}"])


def _paragraphs(summary: Summary) -> Iterator[str]:
    if summary.nonfinite_site:
        yield _nonfinite(summary)
    yield from _kurtosis(summary)
    yield from _massive(summary)
    yield from _super_weights(summary)
    yield from _everyday(summary)
    yield from _experts(summary)
    yield from _sinks(summary)
    yield from _cross_attention(summary)
    if summary.few_bits:
        yield few_bits_sentence(summary.few_bits)
    yield from task_sentences(summary.task_accuracy)


def _notes(summary: Summary) -> Iterator[str]:
    yield from not_measured(summary)
    yield from (f"Note: {note}" for note in summary.notes)


def not_measured(summary: Summary) -> Iterator[str]:
    """A sentence for each reason for which sites are absent; a first one where most of them are."""
    absent = len(summary.absent_sites)
    if absent > summary.measured_sites:
        yield (
            f"Only {summary.measured_sites} of {summary.measured_sites + absent} sites were measured: what "
            "is said here of the model is of those alone"
        )
    sites_by_reason: dict[str, list[str]] = {}
    for site, reason in summary.absent_sites.items():
        sites_by_reason.setdefault(reason, []).append(site)
    yield from (f"Not measured: {', '.join(sites)} ({why})" for why, sites in sites_by_reason.items())


def _cross_attention(summary: Summary) -> Iterator[str]:
    cross = summary.cross_attention
    if "sink_rate" in cross:
        yield (
            f"Cross-attention: sink rate {cross['sink_rate']:.1%} on the first token of the other sequence; "
            f"{cross['sink_heads']} of {cross['heads']} heads sink in at least half of the sequences"
        )
    if cross.get("first_token_attention") is not None:
        yield f"  that token receives {cross['first_token_attention']:.1%} of all cross-attention"
    if "largest_logit" in cross:
        yield (
            f"Largest logit of cross-attention: {number(cross['largest_logit'])}, layer "
            f"{cross['largest_logit_layer']}, head {cross['largest_logit_head']}"
        )


def _nonfinite(summary: Summary) -> str:
    location = f"{summary.nonfinite_site}, layer {summary.nonfinite_layer}"
    if summary.nonfinite_token is not None:
        location += f", token {summary.nonfinite_token}, channel {summary.nonfinite_channel}"
    return (
        f"NaN or Inf: {summary.nonfinite_tokens:,} tokens are not finite. It begins at {location}. These "
        f"tokens are left out of every number here."
    )


def _kurtosis(summary: Summary) -> Iterator[str]:
    """How far a few channels dominate a token."""
    if summary.osp_kurtosis is None:
        yield f"OSP kurtosis: {summary.note or 'not measured'}."
        return
    yield (
        f"OSP kurtosis (osp_excess_kurtosis/1, mean over {summary.hidden_states} hidden states): "
        f"{number(summary.osp_kurtosis)}"
    )
    if summary.osp_kurtosis_of_ceiling is not None and summary.width is not None:
        yield (
            f"  {summary.osp_kurtosis_of_ceiling:.1%} of {summary.width - 3:,}, what a token with a single "
            f"large channel scores; {number(summary.osp_kurtosis_over_floor or 0)} times what random noise "
            f"scores"
        )
    strata = [
        f"{stratum_words(name)} {number(value)}"
        for name, value in summary.osp_kurtosis_by_stratum.items()
        if name != "all"
    ]
    if strata:
        yield f"  {', '.join(strata)}"
    if summary.note:
        yield f"  ({summary.note})"


def _massive(summary: Summary) -> Iterator[str]:
    if summary.massive_emergence_layer is not None:
        channels = (
            f", in channel{'s' * (len(summary.massive_channels) > 1)} "
            + ", ".join(map(str, summary.massive_channels))
            if summary.massive_channels
            else ""
        )
        yield (
            f"Massive activations: layers {summary.massive_emergence_layer} to {summary.massive_last_layer}, "
            f"up to {number(summary.massive_per_sequence or 0)} in a sequence{channels}; "
            f"{carriers(summary)}"
        )
    elif summary.massive_per_sequence is not None:
        yield "Massive activations: none (no |x| above 100 and 1,000 times the median)"
    if summary.jump_layer is not None:
        yield f"  the largest |x| grows {number(summary.jump_factor or 0)}-fold in layer {summary.jump_layer}"
    if summary.largest_magnitude is not None:
        channel = f", channel {summary.largest_channel}" if summary.largest_channel is not None else ""
        yield (
            f"Largest |x|: {number(summary.largest_magnitude)}, at {summary.largest_site}, "
            f"layer {summary.largest_layer}{channel}"
        )


def carriers(summary: Summary) -> str:
    """Which tokens carry the massive activations."""
    if summary.massive_on_first is not None:
        return f"{summary.massive_on_first:.0%} of them on the first token"
    shares = sorted(summary.massive_by_stratum.items(), key=lambda item: -item[1])
    parts = [f"{share:.0%} of them on {stratum_words(name)}" for name, share in shares if share > 0]
    return ", ".join(parts)


def _everyday(summary: Summary) -> Iterator[str]:
    """Channel outliers that have nothing to do with the first token."""
    clauses = []
    if summary.everyday_max_median_ratio is not None:
        clauses.append(
            f"the largest channel of a token is {number(summary.everyday_max_median_ratio)} times its "
            f"median channel"
        )
    for site, channels in summary.outlier_feature_channels.items():
        clauses.append(f"{len(channels)} LLM.int8() outlier feature{'s' * (len(channels) != 1)} at {site}")
    if clauses:
        whom = (
            "Channels, on all tokens"
            if summary.everyday_kurtosis is None
            else f"Everyday channels, on {stratum_words(summary.ordinary_stratum)}"
        )
        yield f"{whom}: {', '.join(clauses)}"


def _super_weights(summary: Summary) -> Iterator[str]:
    if summary.super_weights is None:
        return
    entries = [
        f"layer {layer} [{row}, {column}] = {number(value)}"
        for layer, row, column, value in summary.super_weights
    ]
    listing = "; ".join(entries) if entries else "none"
    yield f"Super weights of down projections ([row, column], super_weight/1): {listing}"


def _experts(summary: Summary) -> Iterator[str]:
    if summary.experts is None:
        return
    clauses = []
    if summary.router_entropy is not None:
        clauses.append(
            f"the router's entropy is {summary.router_entropy:.2f} nats a token "
            f"(ln {summary.experts} = {math.log(summary.experts):.2f} where all are alike)"
        )
    if summary.expert_load_max is not None:
        clauses.append(
            f"the largest load is {summary.expert_load_max:.1f} times the mean (layer "
            f"{summary.expert_load_max_layer}, expert {summary.expert_load_max_expert}); "
            f"{summary.idle_experts} get no token"
        )
    if clauses:
        yield f"Experts: {', '.join(clauses)}"


def _sinks(summary: Summary) -> Iterator[str]:
    if summary.sequence_length == 1:
        yield "Attention: sequences of one token attend to nothing but themselves, so sinks say nothing here"
        return
    if summary.sink_rate is not None:
        yield (
            f"Attention sinks: sink rate {summary.sink_rate:.1%} (how often a head gives the first token "
            f"more than 0.3 of its attention); {summary.sink_heads} of {summary.heads} heads do so in at "
            f"least half of the sequences"
        )
    if summary.first_token_attention is not None:
        yield f"  the first token receives {summary.first_token_attention:.1%} of all attention"
    if summary.largest_logit is not None:
        above = summary.heads_above_qk_clip or 0
        clip = (
            (f"{above} heads exceed 100" if above > 1 else "one head exceeds 100") if above else "below 100"
        )
        yield (
            f"Largest attention logit before the softmax: {number(summary.largest_logit)}, layer "
            f"{summary.largest_logit_layer}, head {summary.largest_logit_head}; {clip}, where QK-Clip would "
            f"act"
        )
