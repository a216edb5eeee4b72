"""Sums over tokens for each channel: the raw material of every statement about channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import TokenCount

__all__ = ["ChannelMoments", "ChannelPowerSums", "channel_average"]

_DIMS = ("stratum", "channel")


@dataclass(frozen=True)
class ChannelPowerSums(Measurement):
    """Σ x, Σ x², Σ x⁴, max |x| and Σ (x − token mean)² over the tokens of each stratum, per channel."""

    name = "channel"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "total": Field(_DIMS),
            "square": Field(_DIMS),
            "fourth": Field(_DIMS),
            "maximum": Field(_DIMS, "maximum"),
            "row_centred_square": Field(_DIMS),
        }

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        return dict(observation.channels._asdict())


def channel_average(state: Mapping[str, Array], field: str) -> Array:
    """A channel sum divided by the tokens of its stratum: (…, stratum, channel), NaN without tokens."""
    sums = state[f"channel.{field}"]
    xp = namespace_of(sums)
    return quotient(sums, xp.broadcast_to(state["token.count"][..., None], sums.shape))


class ChannelMoments(Estimator):
    """Root mean square, mean, largest magnitude and mean fourth power of each channel over tokens.

    Outlier channels stand out in ``channel_rms``; a channel that is large with one sign on every token
    has |mean| ≈ RMS, one that spikes on a few tokens has a large maximum and a small RMS. A stratum
    without tokens gives NaN.
    """

    name: ClassVar[str] = "channel_moments"
    title: ClassVar[str] = "Moments of each channel over tokens"
    formula: ClassVar[str] = "√⟨x_j²⟩, ⟨x_j⟩, max |x_j| and ⟨x_j⁴⟩ over tokens"
    unit: ClassVar[str] = "activation"
    range: ClassVar[str] = "[0, ∞), the mean in (−∞, ∞)"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Kovaleva et al. 2021, BERT Busters: Outlier Dimensions that Disrupt Transformers",
            "https://arxiv.org/abs/2105.06990",
        ),
        Source("He et al. 2024, s_j of neuron kurtosis", "https://arxiv.org/abs/2405.19279"),
    )
    also_used_by: ClassVar[tuple[str, ...]] = (
        "SmoothQuant and AWQ scale weights by the maximum or mean magnitude of each channel.",
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), ChannelPowerSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        square = channel_average(state, "square")
        xp = namespace_of(square)
        maximum = state["channel.maximum"]
        has_tokens = xp.broadcast_to(state["token.count"][..., None] > 0, maximum.shape)
        return {
            "channel_rms": Output(xp.sqrt(square), _DIMS, "activation", "√(mean over tokens of x_j²)"),
            "channel_mean": Output(
                channel_average(state, "total"), _DIMS, "activation", "mean over tokens of x_j"
            ),
            "channel_absolute_maximum": Output(
                xp.where(has_tokens, maximum, xp.nan * xp.ones_like(square)),
                _DIMS,
                "activation",
                "max over tokens of |x_j|",
            ),
            "channel_fourth_power": Output(
                channel_average(state, "fourth"), _DIMS, "activation⁴", "mean over tokens of x_j⁴"
            ),
        }
