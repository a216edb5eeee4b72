"""Neuron kurtosis: are a few channels larger than the others, averaged over tokens?

Second moment over tokens first, fourth moment across channels afterwards: not a kurtosis of tokens.
Two forms circulate; both cost nothing more once the channel sums are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from osp_diag.estimators._arrays import Array, namespace_of
from osp_diag.estimators.base import Estimator, Layout, Measurement, Output, Source
from osp_diag.estimators.channel_moments import ChannelPowerSums, channel_average
from osp_diag.estimators.counts import TokenCount

__all__ = ["NeuronKurtosis", "NeuronKurtosisVariance", "relative_energy"]

HE = Source(
    "He et al. 2024, Understanding and Minimising Outlier Features in Transformer Training",
    "https://arxiv.org/abs/2405.19279",
)


def relative_energy(energy: Array) -> Array:
    """Energies (…, channel) divided by their mean over channels; all 1 where every energy is 0.

    An all-zero tensor counts as evenly spread: the limit of ever smaller even noise.
    """
    xp = namespace_of(energy)
    # A sum that left float32 (JAX) says nothing about shares.
    energy = xp.where(xp.isinf(energy), xp.nan * xp.ones_like(energy), energy)
    peak = xp.max(energy, axis=-1, keepdims=True)
    scaled = energy / xp.where(peak > 0, peak, xp.ones_like(peak))
    mean = xp.mean(scaled, axis=-1, keepdims=True)
    positive = mean > 0
    even = xp.ones_like(energy) + 0.0 * mean
    return xp.where(positive, scaled / xp.where(positive, mean, xp.ones_like(mean)), even)


class NeuronKurtosis(Estimator):
    """He's neuron kurtosis as published: fourth moment across channels of the channels' RMS s_j.

    1 when all channels are equally large, d when one holds everything; it is d divided by the
    participation ratio of the energies s_j². Not centred. He et al. log it on each training batch;
    here s_j is over all tokens of the probe. They report > 600 for a pre-norm 1.2B model and < 10
    for their Outlier Protected block.
    """

    name: ClassVar[str] = "neuron_kurtosis"
    title: ClassVar[str] = "Neuron kurtosis (He)"
    formula: ClassVar[str] = "mean_j s_j⁴ / (mean_j s_j²)², s_j² = mean_t x_tj²"
    range: ClassVar[str] = "[1, d]"
    floor: ClassVar[str] = "1 (equal channels); 1 + 2/n on Gaussian noise of n tokens"
    ceiling: ClassVar[str] = "d, one non-zero channel"
    sources: ClassVar[tuple[Source, ...]] = (HE,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "d / participation_ratio, exactly.",
        "Their released code logs `neuron_kurtosis_variance` instead.",
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), ChannelPowerSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        share = relative_energy(channel_average(state, "square"))
        value = namespace_of(share).mean(share**2, axis=-1)
        ceiling = float(layout.channels)
        return {self.name: Output(value, ("stratum",), definition=self.formula, floor=1.0, ceiling=ceiling)}


class NeuronKurtosisVariance(Estimator):
    """He's neuron kurtosis as their code logs it: the unbiased variance over channels of s_j².

    Each token is centred over the width, everything is divided by one global RMS (so that
    mean_j s_j² = 1), and the variance of s_j² over channels is taken with Bessel's correction. On
    activations whose tokens have mean 0 it is (neuron_kurtosis − 1) · d/(d − 1): 0 means no outlier
    features, where the published form says 1.
    """

    name: ClassVar[str] = "neuron_kurtosis_variance"
    title: ClassVar[str] = "Neuron kurtosis, the form in He's code"
    formula: ClassVar[str] = "Σ_j (u_j − 1)² / (d − 1), u_j = s_j² / mean_j s_j², s_j² = mean_t (x_tj − x̄_t)²"
    range: ClassVar[str] = "[0, d]"
    floor: ClassVar[str] = "0 (equal channels); 2/n on Gaussian noise of n tokens"
    ceiling: ClassVar[str] = "d (d − 2)² / (d − 1)², one non-zero channel"
    sources: ClassVar[tuple[Source, ...]] = (HE,)
    also_used_by: ClassVar[tuple[str, ...]] = ("`neuron_kurtosis` is the published form: about this plus 1.",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), ChannelPowerSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        share = relative_energy(channel_average(state, "row_centred_square"))
        xp, d = namespace_of(share), layout.channels
        value = xp.sum((share - 1.0) ** 2, axis=-1) / max(d - 1, 1)
        ceiling = d * (d - 2) ** 2 / max(d - 1, 1) ** 2
        return {self.name: Output(value, ("stratum",), definition=self.formula, floor=0.0, ceiling=ceiling)}
