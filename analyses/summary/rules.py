"""The rules by which a run is judged: what each asks for, its threshold, and the words of the verdict.

The summary on the terminal, the report and the live page all take their verdict from :func:`judged`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from osp_diag.monitoring.limits import QK_CLIP
from osp_diag.schema import SINK_EPSILON, stratum_words

__all__ = [
    "EVERYDAY",
    "FEW_BITS_COST",
    "NEAR_GAUSSIAN",
    "RULES",
    "SINKS",
    "SINK_HEAD",
    "STATES",
    "Judgement",
    "State",
    "judged",
    "verdict_words",
]

# Why good and bad are judged here alone: docs/decisions.md, Pages.
NEAR_GAUSSIAN = 3.0
"""Kurtosis up to so many times the Gaussian floor is called outlier-free."""
EVERYDAY = 1.0
"""Excess kurtosis of ordinary tokens (in text neither first nor delimiters) from which on channels are
outliers."""
SINKS = 0.1
"""Sink rate from which on the verdict speaks of attention sinks."""
FEW_BITS_COST = 1.5
"""Perplexity at 4 bits over that at 16 from which on few bits are called costly."""
SINK_HEAD = 0.5
"""A head is called a sink head if it sinks in at least this share of the sequences."""

State = Literal["broken", "raised", "clear", "unknown"]
STATES: tuple[State, ...] = ("broken", "raised", "clear", "unknown")
"""Worst first: no number can be trusted; above the rule's threshold; below it; not measured."""

RULES = {
    "nonfinite": "no token has a NaN or Inf in its activations",
    "massive": "no |x| at block outputs is above 100 and 1,000 times the median of its sequence",
    "kurtosis": f"OSP kurtosis, mean over hidden states: at most {NEAR_GAUSSIAN:g} times its Gaussian floor",
    "everyday": f"OSP kurtosis of tokens that are neither first nor delimiters: below {EVERYDAY:g}",
    "sinks": f"sink rate at ε = {SINK_EPSILON:g}, mean over heads: below {SINKS:.0%}",
    "logits": f"largest attention logit before the softmax: at most {QK_CLIP:g}, where QK-Clip would act",
    "few_bits": f"perplexity at 4 bits: less than {FEW_BITS_COST:g} times that at 16",
    "emergence": "no block output leaves the noise for good while the model trains",
}
"""What each rule asks for, in the order in which the verdict speaks of them."""


class Judgement(NamedTuple):
    """What a rule says of a run."""

    state: State
    words: str = ""
    """a few words for the verdict; empty if there is nothing to say there"""


UNKNOWN, CLEAR = Judgement("unknown"), Judgement("clear")


def judged(numbers: Mapping[str, Any]) -> dict[str, Judgement]:
    """The judgement of every rule that a summary's numbers answer.

    Parameters
    ----------
    numbers : the fields of :class:`osp_diag.analyses.summary.summary.Summary`; what is missing counts as None
    """
    return {
        "nonfinite": _nonfinite(numbers),
        "massive": _massive(numbers),
        "kurtosis": _kurtosis(numbers),
        "everyday": _above(numbers, "everyday_kurtosis", EVERYDAY, "everyday channel outliers"),
        "sinks": _above(numbers, "sink_rate", SINKS, "attention sinks"),
        "logits": _logits(numbers),
        "few_bits": _few_bits(numbers),
    }


def verdict_words(judgements: Iterable[Judgement]) -> str:
    """The verdict: what is wrong, in the order of the rules, or that nothing is."""
    words = [judgement.words for judgement in judgements if judgement.words]
    return "; ".join(words) or "not enough was measured for a verdict"


def _nonfinite(numbers: Mapping[str, Any]) -> Judgement:
    if numbers.get("nonfinite_site"):
        return Judgement("broken", "NaN or Inf in the activations")
    return CLEAR if numbers.get("nonfinite_counted") else UNKNOWN


def _massive(numbers: Mapping[str, Any]) -> Judgement:
    if numbers.get("massive_per_sequence") is None:
        return UNKNOWN
    if numbers.get("massive_emergence_layer") is None:
        return CLEAR
    on_first = (numbers.get("massive_on_first") or 0.0) >= 0.5
    return Judgement("raised", "massive activations" + " on the first token" * on_first)


def _kurtosis(numbers: Mapping[str, Any]) -> Judgement:
    """Names the model outlier-free, or its outliers where no other rule has named them already."""
    over_floor = numbers.get("osp_kurtosis_over_floor")
    if over_floor is None:
        return UNKNOWN
    everyday = numbers.get("everyday_kurtosis")
    has_outlier_words = (
        bool(numbers.get("nonfinite_site"))
        or numbers.get("massive_emergence_layer") is not None
        or (everyday is not None and everyday >= EVERYDAY)
    )
    if over_floor <= NEAR_GAUSSIAN:
        return Judgement("clear", "" if has_outlier_words else "outlier-free")
    if has_outlier_words:
        return Judgement("raised")
    special = [stratum_words(name) for name, value in _set_apart(numbers).items() if value >= EVERYDAY]
    words = (
        f"outliers on the {' and the '.join(special)} only" if special else "mild heavy tails, no outliers"
    )
    return Judgement("raised", words)


def _set_apart(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The kurtosis of the first token, or of each kind of token other than the ordinary ones."""
    parts: Mapping[str, float] = numbers.get("osp_kurtosis_by_stratum") or {}
    others = ("all", "delimiter", numbers.get("ordinary_stratum", "rest"))
    return {name: value for name, value in parts.items() if name not in others}


def _above(numbers: Mapping[str, Any], name: str, threshold: float, words: str) -> Judgement:
    value = numbers.get(name)
    if value is None:
        return UNKNOWN
    return Judgement("raised", words) if value >= threshold else CLEAR


def _logits(numbers: Mapping[str, Any]) -> Judgement:
    if numbers.get("largest_logit") is None:
        return UNKNOWN
    if numbers.get("heads_above_qk_clip"):
        return Judgement("raised", f"attention logits above {QK_CLIP:g}")
    return CLEAR


def _few_bits(numbers: Mapping[str, Any]) -> Judgement:
    ratio = (numbers.get("few_bits") or {}).get("ratio")
    if ratio is None:
        return UNKNOWN
    return Judgement("raised") if ratio >= FEW_BITS_COST else CLEAR
