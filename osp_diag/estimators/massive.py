"""Massive activations: single elements of a sequence thousands of times larger than its median."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import (
    Array,
    accumulator_dtype,
    index_range,
    namespace_of,
    quotient,
    top_entries,
    top_values,
)
from osp_diag.estimators.activation import ActivationObservation, over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import SequenceCount, TokenCount, per_sequence, per_token

__all__ = [
    "MassiveActivationCounts",
    "MassiveActivations",
    "PeakMedianRatio",
    "SequenceMagnitudes",
    "SequencePeakRatio",
    "SystematicOutlierCounts",
    "SystematicOutlierTokens",
    "TopMagnitude",
    "summed_ratio",
]

RESIDUAL = ("embedding", "residual_*")
SUN = Source(
    "Sun et al. 2024, Massive Activations in Large Language Models", "https://arxiv.org/abs/2402.17762"
)


def _largest_elements(observation: ActivationObservation, ranks: int) -> Array:
    """The largest |x| of each sequence's tokens of each stratum, largest first: (stratum, batch, rank).

    They lie in the tokens with the largest peaks, so only ``ranks`` tokens have to be looked at.
    """
    x, parts = observation.x, observation.strata[1:, ...]
    xp = namespace_of(x)
    batch, length, d = x.shape
    strata = parts.shape[0]
    # Tokens outside of the stratum get a peak of −1, below every magnitude.
    missing = -xp.ones_like(parts)
    peaks, token = top_entries(xp.where(parts > 0, observation.peak[None, ...], missing), ranks)
    rows = token + index_range(0, batch, x)[None, :, None] * length
    magnitudes = xp.take(xp.reshape(x, (batch * length, d)), xp.reshape(rows, (-1,)), axis=0)
    magnitudes = xp.reshape(xp.abs(magnitudes), (strata, batch, peaks.shape[-1], d))
    magnitudes = xp.where(peaks[..., None] >= 0, magnitudes, xp.zeros_like(magnitudes))
    magnitudes = xp.reshape(magnitudes, (strata, batch, peaks.shape[-1] * d))
    # A sequence with fewer elements than ranks is filled up with zeros.
    short = ranks - magnitudes.shape[-1]
    if short > 0:
        magnitudes = xp.concat([magnitudes] + [missing[..., :1] * 0.0] * short, axis=-1)
    top = top_values(magnitudes, ranks)
    # The largest of "all" are among the largest of its strata.
    union = top_values(xp.reshape(xp.permute_dims(top, (1, 0, 2)), (batch, strata * ranks)), ranks)
    return xp.concat([union[None, ...], top], axis=0)


@dataclass(frozen=True)
class SequenceMagnitudes(Measurement):
    """Sums over sequences of the top magnitudes and of the exact lower median."""

    ranks: int = 3
    name = "sequence_magnitude"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"top": Field(("stratum", "rank")), "median": Field(())}

    def coords(self) -> Mapping[str, Sequence[int]]:
        return {"rank": tuple(range(1, self.ranks + 1))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.strata)
        wide = accumulator_dtype(xp, observation.strata)
        top = xp.astype(_largest_elements(observation, self.ranks), wide)
        median = xp.astype(observation.sequence_median, wide)
        return {"top": xp.sum(top, axis=1), "median": xp.sum(median)}


@dataclass(frozen=True)
class SequencePeakRatio(Measurement):
    """Sum over sequences of max |X| / median |X|, where the median is not 0."""

    name = "sequence_peak_ratio"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(()), "count": Field(())}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.strata)
        wide = accumulator_dtype(xp, observation.strata)
        return summed_ratio(
            xp.astype(xp.max(observation.peak, axis=-1), wide), xp.astype(observation.sequence_median, wide)
        )


def summed_ratio(peak: Array, median: Array) -> dict[str, Array]:
    """Sum of peak / median over sequences, and the number of sequences whose median is not 0."""
    xp = namespace_of(peak)
    defined = median > 0
    ratio = peak / xp.where(defined, median, xp.ones_like(median))
    return {
        "total": xp.sum(xp.where(defined, ratio, xp.zeros_like(ratio))),
        "count": xp.sum(xp.astype(defined, ratio.dtype)),
    }


@dataclass(frozen=True)
class TopMagnitude(Estimator):
    """The three largest and the median |x| of each sequence's T · d elements, mean over sequences.

    Drawn against depth, this is the profile of Sun et al., who apply no threshold: mean of 10
    sequences without BOS, tokens and channels flattened together. The median is the lower middle
    value, over all strata. LLaMA2-7B: top-1 of 2556.8 ± 141, in channels 1415 and 2533. Strata are
    those of the token that carries the element; a sequence without such a token is left out.
    """

    ranks: int = 3

    name: ClassVar[str] = "top_magnitude"
    title: ClassVar[str] = "Largest magnitudes and median of a sequence (Sun)"
    formula: ClassVar[str] = (
        "mean over sequences of the top-1, top-2, top-3 and median of |X|, T · d elements"
    )
    unit: ClassVar[str] = "activation"
    range: ClassVar[str] = "[0, ∞)"
    sources: ClassVar[tuple[Source, ...]] = (SUN,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Sun, Canziani, LeCun and Zhu 2026: top-3 channel magnitudes per block.",
    )
    sites: ClassVar[tuple[str, ...]] = RESIDUAL

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise EstimatorError(f"ranks must be at least 1; got {self.ranks}")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SequenceCount(), SequenceMagnitudes(self.ranks))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        top, count = state["sequence_magnitude.top"], state["sequence.count"]
        xp = namespace_of(top)
        ranks = top.shape[-1]
        return {
            self.name: Output(
                quotient(top, xp.broadcast_to(count[..., None], top.shape)),
                ("stratum", "rank"),
                "activation",
                "mean over sequences of the rank-th largest |x|",
                coords={"rank": tuple(range(1, ranks + 1))},
            ),
            "median_magnitude": Output(
                quotient(state["sequence_magnitude.median"], count[..., 0]),
                (),
                "activation",
                "mean over sequences of the lower median of |X| over T · d elements",
            ),
        }


@dataclass(frozen=True)
class PeakMedianRatio(Estimator):
    """max |X| / median |X| over the T · d elements of a sequence, mean over sequences.

    The curve whose growth over training Gallego-Feliciano et al. fit by A·e^(−λx)·log x + K. Their
    paper gives r per layer and step; taken here sequence by sequence, then averaged. A sequence whose
    median is 0 is left out.
    """

    name: ClassVar[str] = "peak_median_ratio"
    title: ClassVar[str] = "Peak to median ratio of a sequence"
    formula: ClassVar[str] = "mean over sequences of max |X| / median |X|, over T · d elements"
    range: ClassVar[str] = "[1, ∞)"
    floor: ClassVar[str] = "≈ √(2 log(T · d)) / 0.6745 on Gaussian noise"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Gallego-Feliciano et al. 2025, Hidden Dynamics of Massive Activations in Transformer Training",
            "https://arxiv.org/abs/2508.03616",
        ),
    )
    also_used_by: ClassVar[tuple[str, ...]] = ("Confusable with `max_median_ratio`, which is per token.",)
    sites: ClassVar[tuple[str, ...]] = RESIDUAL

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SequencePeakRatio(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        ratio = quotient(state["sequence_peak_ratio.total"], state["sequence_peak_ratio.count"])
        return {self.name: Output(ratio, (), definition=self.formula, floor=1.0)}


@dataclass(frozen=True)
class MassiveActivationCounts(Measurement):
    """Number of elements with |x| > ``absolute`` and |x| ≥ ``relative`` · median of the sequence."""

    absolute: float = 100.0
    relative: float = 1000.0
    name = "massive_activation"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(("stratum",)), "channel": Field(("channel",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.strata)
        # "More than" as "at least the next float32 above", so that one comparison does for both rules.
        above = self.absolute * (1.0 + 2.0**-23)
        threshold = xp.clip(self.relative * observation.sequence_median, above, math.inf)
        exceedances = observation.beyond(threshold)
        return {
            "total": over_strata(exceedances.token, observation.strata),
            "channel": exceedances.channel[0, ...],
        }


@dataclass(frozen=True)
class MassiveActivations(Estimator):
    """How many massive activations a sequence has, by stratum and by channel.

    Massive: |x| > 100 and at least 1000 times the sequence's median |X| (Sun et al.'s rule of thumb
    for block outputs). Both outputs are mean numbers per sequence; the channels add up to stratum
    ``all``. Sun et al. find that the rule misses models below about 1B parameters, whose magnitudes are
    often smaller (SmolLM2-135M meets it); ``peak_median_ratio`` has no threshold. The first layer where
    the count is not 0 is the massive emergence layer.
    """

    absolute: float = 100.0
    relative: float = 1000.0

    name: ClassVar[str] = "massive_activations"
    title: ClassVar[str] = "Massive activations"
    formula: ClassVar[str] = "mean over sequences of #{|x| > 100 and |x| ≥ 1000 · median |X|}"
    unit: ClassVar[str] = "elements per sequence"
    range: ClassVar[str] = "[0, T · d / 2]"
    ceiling: ClassVar[str] = "T · d / 2, since they exceed the median"
    floor: ClassVar[str] = "0"
    sources: ClassVar[tuple[Source, ...]] = (SUN,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Shi 2026: first layer where one appears (massive emergence layer).",
        "An et al. 2025 compare with the mean instead: `systematic_outlier_tokens`.",
    )
    sites: ClassVar[tuple[str, ...]] = RESIDUAL

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SequenceCount(), MassiveActivationCounts(self.absolute, self.relative))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        channel = state["massive_activation.channel"]
        sequences = state["sequence.count"][..., :1]
        xp = namespace_of(channel)
        rule = f"|x| > {self.absolute:g} and |x| ≥ {self.relative:g} · median |X|"
        unit = "elements per sequence"
        count = per_sequence(state, "massive_activation.total")
        return {
            "massive_activation_count": Output(count, ("stratum",), unit, f"mean number with {rule}"),
            "massive_activation_channel_count": Output(
                quotient(channel, xp.broadcast_to(sequences, channel.shape)),
                ("channel",),
                unit,
                f"mean number in the channel with {rule}",
            ),
        }


@dataclass(frozen=True)
class SystematicOutlierCounts(Measurement):
    """Number of tokens with max_j |x_tj| > ``relative`` · mean |X| of the sequence."""

    relative: float = 1000.0
    name = "systematic_outlier"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(("stratum",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        rows = observation.wide_moments
        xp = namespace_of(rows.scale)
        # In units of the sequence's largest magnitude, so that no sum leaves the range.
        peak = xp.max(rows.scale, axis=-1, keepdims=True)
        share = rows.scale / xp.where(peak > 0, peak, xp.ones_like(peak))
        tokens = xp.astype(observation.tokens_per_sequence, share.dtype)[:, None]
        mean = xp.sum(share * rows.absolute, axis=-1, keepdims=True) / xp.clip(tokens, 1.0, math.inf)
        beyond = xp.astype(share > self.relative * mean, share.dtype)
        return {"total": over_strata(beyond, observation.strata)}


@dataclass(frozen=True)
class SystematicOutlierTokens(Estimator):
    """Tokens whose largest channel exceeds 1000 times the sequence's mean |X|.

    An et al.'s activation outliers. The mean is pulled up by the outliers themselves, so at least
    1000 elements per outlier are needed before anything can be flagged; with a median
    (``massive_activations``) that does not happen.
    """

    relative: float = 1000.0

    name: ClassVar[str] = "systematic_outlier_tokens"
    title: ClassVar[str] = "Systematic outlier tokens (An)"
    formula: ClassVar[str] = "mean over sequences of #{t: max_j |x_tj| > 1000 · mean |X|}"
    unit: ClassVar[str] = "tokens per sequence"
    range: ClassVar[str] = "[0, T]"
    floor: ClassVar[str] = "0"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "An et al. 2025, Systematic Outliers in Large Language Models", "https://arxiv.org/abs/2502.06415"
        ),
    )
    also_used_by: ClassVar[tuple[str, ...]] = ("Confusable with Sun et al.'s massive activations.",)
    sites: ClassVar[tuple[str, ...]] = RESIDUAL

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), SequenceCount(), SystematicOutlierCounts(self.relative))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        rule = f"max_j |x_tj| > {self.relative:g} · mean |X|"
        return {
            "systematic_outlier_token_count": Output(
                per_sequence(state, "systematic_outlier.total"),
                ("stratum",),
                "tokens per sequence",
                f"mean number of tokens with {rule}",
            ),
            "systematic_outlier_token_fraction": Output(
                per_token(state, "systematic_outlier.total"),
                ("stratum",),
                definition=f"share of tokens with {rule}",
            ),
        }
