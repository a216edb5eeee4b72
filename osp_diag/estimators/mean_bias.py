"""How much of the activations' energy is one vector that all tokens share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators.base import Estimator, Layout, Measurement, Output, Source
from osp_diag.estimators.channel_moments import ChannelPowerSums, channel_average
from osp_diag.estimators.counts import TokenCount

__all__ = ["MeanBiasShare"]


class MeanBiasShare(Estimator):
    """Energy of the mean activation over the mean energy of a token.

    The mean over tokens is a matrix of rank one: 1 where every token is the same vector, near 0 where
    tokens cancel. Outlier channels that keep their sign on all tokens are part of it, spikes on few tokens
    are not.
    """

    name: ClassVar[str] = "mean_bias_share"
    title: ClassVar[str] = "Share of energy in the mean over tokens"
    formula: ClassVar[str] = "‖μ‖² / mean_t ‖x_t‖², μ = mean_t x_t"
    range: ClassVar[str] = "[0, 1]"
    floor: ClassVar[str] = "1 / n for n independent tokens of mean zero"
    ceiling: ClassVar[str] = "1, all tokens equal"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Cao et al. 2026, The Curse and Blessing of Mean Bias in FP4-Quantized LLM Training",
            "https://arxiv.org/abs/2603.10444",
        ),
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), ChannelPowerSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean, square = channel_average(state, "total"), channel_average(state, "square")
        xp = namespace_of(mean)
        share = quotient(xp.sum(mean * mean, axis=-1), xp.sum(square, axis=-1))
        return {self.name: Output(share, ("stratum",), "1", self.formula, floor=0.0, ceiling=1.0)}
