"""Outliers by fixed magnitude (6) and by standard deviations (6σ)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, accumulator_dtype, index_range, namespace_of, quotient
from osp_diag.estimators.activation import ActivationObservation, is_constant, over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.channel_moments import ChannelPowerSums
from osp_diag.estimators.counts import SequenceCount, TokenCount, per_sequence

__all__ = [
    "ChannelsAboveSix",
    "InfinityNorm",
    "InfinityNormSums",
    "LargeChannelCounts",
    "OutlierFeatures",
    "SixSigmaCounts",
    "SixSigmaOutliers",
    "outlier_features",
]

BONDARENKO_2021 = Source(
    "Bondarenko et al. 2021, Understanding and Overcoming the Challenges of Efficient Transformer "
    "Quantization",
    "https://arxiv.org/abs/2109.12948",
)
BONDARENKO_2023 = Source(
    "Bondarenko et al. 2023, Quantizable Transformers", "https://arxiv.org/abs/2306.12929"
)
DETTMERS = Source("Dettmers et al. 2022, LLM.int8()", "https://arxiv.org/abs/2208.07339")


@dataclass(frozen=True)
class LargeChannelCounts(Measurement):
    """Number of tokens with |x_j| ≥ ``threshold``, per channel."""

    threshold: float = 6.0
    name = "large_channel"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"count": Field(("stratum", "channel"))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.strata)
        threshold = xp.full_like(observation.peak[:, 0], self.threshold)
        return {"count": observation.beyond(threshold).channel}


@dataclass(frozen=True)
class OutlierFeatures(Estimator):
    """Share of tokens on which a channel reaches |x| ≥ 6: the quantity behind LLM.int8()'s rule.

    The rule itself needs all layers: :func:`outlier_features` applies it to this share. Dettmers et
    al. look at the inputs of the attention projections and of the feed-forward expansion
    (``attention_input``, ``mlp_input``); it is measured everywhere here.
    """

    threshold: float = 6.0

    name: ClassVar[str] = "outlier_features"
    title: ClassVar[str] = "Outlier features (LLM.int8())"
    formula: ClassVar[str] = "share of tokens with |x_tj| ≥ 6, per channel"
    range: ClassVar[str] = "[0, 1]"
    floor: ClassVar[str] = "0"
    ceiling: ClassVar[str] = "1"
    sources: ClassVar[tuple[Source, ...]] = (DETTMERS,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "bitsandbytes keeps these channels in 16 bits (its `llm_int8_threshold` = 6).",
        "Elhage et al. count the channels that ever exceed 6: `channels_above_six`.",
    )

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise EstimatorError(f"threshold must be positive; got {self.threshold}")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), LargeChannelCounts(self.threshold))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        count = state["large_channel.count"]
        tokens = namespace_of(count).broadcast_to(state["token.count"][..., None], count.shape)
        return {
            "outlier_feature_fraction": Output(
                quotient(count, tokens),
                ("stratum", "channel"),
                definition=f"share of tokens with |x_j| ≥ {self.threshold:g}",
                floor=0.0,
                ceiling=1.0,
            )
        }


def outlier_features(fraction: Array, *, layers: float = 0.25, positions: float = 0.06) -> Array:
    """LLM.int8()'s rule: which channels are outlier features. (…, layer, channel) → bool (…, channel).

    A channel is one if it reaches the magnitude at least once in at least ``layers`` of the layers, and
    on at least ``positions`` of the positions over all layers. ``fraction`` is
    ``outlier_feature_fraction`` of one stratum. Source: Dettmers et al. 2022, section 4.1.
    """
    for name, value in (("layers", layers), ("positions", positions)):
        if not 0.0 <= value <= 1.0:
            raise EstimatorError(f"{name} is a share and must be between 0 and 1; got {value}")
    xp = namespace_of(fraction)
    affected = xp.mean(xp.astype(fraction > 0, fraction.dtype), axis=-2)
    return (affected >= layers) & (xp.mean(fraction, axis=-2) >= positions)


@dataclass(frozen=True)
class SixSigmaCounts(Measurement):
    """Number of elements ``multiple`` standard deviations or more from their sequence's mean."""

    multiple: float = 6.0
    name = "six_sigma"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "total": Field(("stratum",)),
            "channel": Field(("channel",)),
            "position": Field(("token_position",)),
        }

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        pooled, x = observation.sequences, observation.x
        xp = namespace_of(x)
        # Row 0 is stratum "all": mean and deviation of the whole sequence, in its own scale.
        # Why by sequence and not by batch: docs/decisions.md, Estimators.
        n = pooled.elements[0, ...]
        n = xp.where(n > 1, n, 2 * xp.ones_like(n))
        second, mean, scale = pooled.central_second[0, ...], pooled.mean[0, ...], pooled.scale[0, ...]
        # The limit 6 s, s² = m₂ n/(n − 1), back in the units of x.
        deviation = self.multiple * xp.sqrt(second * n / (n - 1)) * scale
        # A constant sequence has no outliers; its own rounding is not one.
        deviation = xp.where(is_constant(second, mean), math.inf * xp.ones_like(deviation), deviation)
        # Cast only what float32 can hold.
        deviation = xp.where(deviation > 3.4e38, math.inf * xp.ones_like(deviation), deviation)
        exceedances = observation.beyond(xp.astype(deviation, x.dtype), xp.astype(mean * scale, x.dtype))
        token_counts = xp.astype(exceedances.token * observation.strata[0, ...], pooled.mean.dtype)
        return {
            "total": over_strata(exceedances.token, observation.strata),
            "channel": exceedances.channel[0, ...],
            "position": xp.sum(_from_start(token_counts, observation.start), axis=0),
        }


def _from_start(values: Array, start: Array) -> Array:
    """(batch, token) → the same with each sequence moved to begin with its first token; 0 behind its end."""
    xp = namespace_of(values)
    tokens = values.shape[1]
    place = index_range(0, tokens, values)[None, :] + start[:, None]
    moved = xp.take_along_axis(values, xp.clip(place, 0, tokens - 1), axis=1)
    return xp.where(place < tokens, moved, xp.zeros_like(moved))


@dataclass(frozen=True)
class SixSigmaOutliers(Estimator):
    """Elements at least 6 standard deviations from the mean of their sequence's tensor.

    Mean and deviation (Bessel) are over all T · d counted elements of the sequence, whatever the
    stratum. Given as a share of all elements, and as mean numbers per sequence in each channel and at
    each token position, counted from the first token that is not padding (Bondarenko's two histograms).
    Gaussian noise gives 2e-9.
    """

    multiple: float = 6.0

    name: ClassVar[str] = "six_sigma_outliers"
    title: ClassVar[str] = "6σ outliers (Bondarenko)"
    formula: ClassVar[str] = "#{|x − x̄| ≥ 6 s}, x̄ and s over the T · d elements of a sequence"
    range: ClassVar[str] = "[0, 1/36] for the share of all tokens; [0, 1] for that of a stratum"
    floor: ClassVar[str] = "2e-9 on Gaussian noise"
    ceiling: ClassVar[str] = (
        "1/36 for `all` (Chebyshev); 1 for a stratum, whose tokens may all be outliers of the sequence"
    )
    sources: ClassVar[tuple[Source, ...]] = (BONDARENKO_2021, BONDARENKO_2023)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Park et al. 2025 use the 6σ rule for tokens with massive activations.",
        "Confusable with LLM.int8()'s |x| ≥ 6, which is not relative to anything.",
    )

    def __post_init__(self) -> None:
        if not self.multiple > 0:
            raise EstimatorError(f"multiple must be positive; got {self.multiple}")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), SequenceCount(), SixSigmaCounts(self.multiple))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        channel, position = state["six_sigma.channel"], state["six_sigma.position"]
        xp = namespace_of(channel)
        sequences = state["sequence.count"][..., :1]
        rule = f"at least {self.multiple:g} standard deviations from the sequence's mean"
        unit = "elements per sequence"
        return {
            "six_sigma_fraction": Output(
                quotient(state["six_sigma.total"], state["token.count"] * layout.channels),
                ("stratum",),
                definition=f"share of elements {rule}",
                floor=0.0,
                # Chebyshev bounds the share of all tokens alone, and this has to hold for every stratum.
                ceiling=1.0,
            ),
            "six_sigma_channel_count": Output(
                quotient(channel, xp.broadcast_to(sequences, channel.shape)),
                ("channel",),
                unit,
                f"mean number of elements of the channel {rule}",
            ),
            "six_sigma_position_count": Output(
                quotient(position, xp.broadcast_to(sequences, position.shape)),
                ("token_position",),
                unit,
                f"mean number of elements at the position {rule}",
            ),
        }


@dataclass(frozen=True)
class ChannelsAboveSix(Estimator):
    """Number of channels whose |x| exceeds 6 on any token.

    A maximum over the data: it grows with the number of tokens (Elhage et al. use 128 × 1024).
    """

    threshold: float = 6.0

    name: ClassVar[str] = "channels_above_six"
    title: ClassVar[str] = "Channels that ever exceed 6 (Elhage)"
    formula: ClassVar[str] = "#{j: max_t |x_tj| > 6}"
    unit: ClassVar[str] = "channels"
    range: ClassVar[str] = "[0, d]"
    floor: ClassVar[str] = "0"
    ceiling: ClassVar[str] = "d"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Elhage et al. 2023, Privileged Bases in the Transformer Residual Stream",
            "https://transformer-circuits.pub/2023/privileged-basis/index.html",
        ),
        DETTMERS,
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), ChannelPowerSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        maximum, tokens = state["channel.maximum"], state["token.count"]
        xp = namespace_of(maximum)
        number = xp.sum(xp.astype(maximum > self.threshold, maximum.dtype), axis=-1)
        number = xp.where(tokens > 0, number, xp.nan * xp.ones_like(number))
        return {
            self.name: Output(
                number,
                ("stratum",),
                "channels",
                f"number of channels with |x| > {self.threshold:g} on any token",
                floor=0.0,
                ceiling=float(layout.channels),
            )
        }


@dataclass(frozen=True)
class InfinityNormSums(Measurement):
    """Sum over sequences of max |x|."""

    name = "infinity_norm"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(("stratum",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.strata)
        wide = accumulator_dtype(xp, observation.strata)
        largest = xp.max(observation.strata * observation.peak[None, ...], axis=-1)
        return {"total": xp.sum(xp.astype(largest, wide), axis=-1)}


class InfinityNorm(Estimator):
    """max |x| over the tokens and channels of a sequence, mean over sequences.

    Bondarenko et al. then take the maximum over modules. Not ``absolute_maximum``, which is over all
    sequences.
    """

    name: ClassVar[str] = "infinity_norm"
    title: ClassVar[str] = "Infinity norm of a sequence (Bondarenko)"
    formula: ClassVar[str] = "mean over sequences of max_tj |x_tj|"
    unit: ClassVar[str] = "activation"
    range: ClassVar[str] = "[0, ∞)"
    sources: ClassVar[tuple[Source, ...]] = (BONDARENKO_2023,)
    also_used_by: ClassVar[tuple[str, ...]] = ("Equal to `top_magnitude` at rank 1.",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SequenceCount(), InfinityNormSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = per_sequence(state, "infinity_norm.total")
        return {self.name: Output(mean, ("stratum",), "activation", self.formula)}
