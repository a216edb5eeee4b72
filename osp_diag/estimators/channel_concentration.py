"""How much of the energy Σ x² sits in few channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, index_range, namespace_of, top_entries
from osp_diag.estimators.base import Estimator, Layout, Measurement, Output, Source
from osp_diag.estimators.channel_moments import ChannelPowerSums, channel_average
from osp_diag.estimators.counts import TokenCount
from osp_diag.estimators.neuron_kurtosis import relative_energy

__all__ = ["ChannelConcentration", "top_channel_overlap", "top_channels"]


def top_channels(energy: Array, top: int) -> Array:
    """Indices of the ``top`` largest channels, largest first: (…, channel) → (…, top)."""
    return top_entries(energy, top)[1]


def top_channel_overlap(first: Array, second: Array, top: int = 4) -> Array:
    """Jaccard overlap of the sets of ``top`` largest channels: (…, channel) twice → (…) in [0, 1].

    Between two steps or two layers it tells whether the hot channels stay the same: early in
    training they wander, later they settle.
    """
    if not 1 <= top <= first.shape[-1]:
        raise EstimatorError(f"top must be between 1 and the {first.shape[-1]} channels; got {top}")
    xp = namespace_of(first)
    same = top_channels(first, top)[..., :, None] == top_channels(second, top)[..., None, :]
    shared = xp.sum(xp.astype(same, first.dtype), axis=(-2, -1))
    return shared / (2 * top - shared)


@dataclass(frozen=True)
class ChannelConcentration(Estimator):
    """Share of the energy in the largest channels, participation ratio, Gini, entropy, max to mean.

    With p_j = Σ_t x_tj² / Σ_tj x_tj²: ``channel_share`` is the sum of the k largest p; the
    participation ratio 1 / Σ p² is the effective number of channels in use (d / He's neuron kurtosis);
    Gini is 0 for equal channels and 1 − 1/d for one; the entropy is divided by log d, so 1 is even
    and 0 is one channel; ``channel_max_to_mean`` is max_j s_j / mean_j s_j of the channels' RMS. A
    tensor of zeros counts as even.
    """

    tops: tuple[int, ...] = (1, 2, 4, 8, 16)

    name: ClassVar[str] = "channel_concentration"
    title: ClassVar[str] = "Concentration of energy in few channels"
    formula: ClassVar[str] = "top-k Σ p_j, 1 / Σ p_j², Gini(p), −Σ p_j log p_j / log d, max s_j / mean s_j"
    range: ClassVar[str] = (
        "share (0, 1]; participation [1, d]; Gini [0, 1 − 1/d]; entropy [0, 1]; ratio [1, d]"
    )
    floor: ClassVar[str] = "equal channels: share k/d, participation d, Gini 0, entropy 1, ratio 1"
    ceiling: ClassVar[str] = "one channel: share 1, participation 1, Gini 1 − 1/d, entropy 0, ratio d"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("Participation ratio: Bell and Dean 1970", "https://doi.org/10.1039/DF9705000055"),
        Source("He et al. 2024 (its inverse times d)", "https://arxiv.org/abs/2405.19279"),
    )
    also_used_by: ClassVar[tuple[str, ...]] = (
        "He et al.: neuron_kurtosis = d / participation_ratio.",
        "Gini and entropy are of the energies s_j², not of s_j: other tools may take s_j.",
    )

    def __post_init__(self) -> None:
        if not self.tops or min(self.tops) < 1:
            raise EstimatorError(f"tops must be positive numbers of channels; got {self.tops}")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), ChannelPowerSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        energy = relative_energy(channel_average(state, "square"))
        xp, d = namespace_of(energy), layout.channels
        share = energy / d
        ascending = xp.sort(share, axis=-1)
        # NaN (no tokens) sorts last on every backend and spreads through the sums.
        tops = [xp.sum(ascending[..., max(d - top, 0) :], axis=-1) for top in self.tops]
        place = xp.astype(index_range(0, d, share), share.dtype)
        # Gini of ascending p with Σ p = 1, ranks from 0: Σ_i (2i − (d − 1)) p_i / d.
        gini = xp.sum((2 * place - (d - 1)) * ascending, axis=-1) / d
        positive = share > 0
        # p log p → 0 as p → 0; 0.0 * share keeps the NaN of a stratum without tokens.
        logarithm = xp.log(xp.where(positive, share, xp.ones_like(share)))
        entropy = -xp.sum(xp.where(positive, share * logarithm, 0.0 * share), axis=-1)
        rms = xp.sqrt(energy)
        stratum, floor_share = ("stratum",), min(self.tops[0], d) / d
        return {
            "channel_share": Output(
                xp.stack(tops, axis=-1),
                ("stratum", "top"),
                definition="share of Σ x² in the `top` largest channels",
                coords={"top": self.tops},
                floor=floor_share,
                ceiling=1.0,
            ),
            "participation_ratio": Output(
                1.0 / (d * xp.mean(share**2, axis=-1)),
                stratum,
                "channels",
                "(Σ_j s_j²)² / Σ_j s_j⁴",
                floor=float(d),
                ceiling=1.0,
            ),
            "channel_gini": Output(
                gini, stratum, definition="Gini coefficient of s_j²", floor=0.0, ceiling=1 - 1 / d
            ),
            "channel_entropy": Output(
                entropy / math.log(d) if d > 1 else 1.0 + 0.0 * entropy,
                stratum,
                definition="−Σ_j p_j log p_j / log d, p_j = s_j² / Σ s²",
                floor=1.0,
                ceiling=0.0,
            ),
            "channel_max_to_mean": Output(
                xp.max(rms, axis=-1) / xp.mean(rms, axis=-1),
                stratum,
                definition="max_j s_j / mean_j s_j",
                floor=1.0,
                ceiling=float(d),
            ),
        }
