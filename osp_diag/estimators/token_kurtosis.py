"""Kurtosis of one token over its channels: several definitions under one word.

All need the same row moments; they differ in centring, in the variance's normalisation and in what
is averaged, enough to differ by tens of percent on the same activations. A token whose channels are
all equal has no kurtosis; it counts as 0 excess (3 non-excess) here, so that no mean becomes NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from osp_diag.estimators._arrays import Array, float32_matmul, namespace_of, quotient
from osp_diag.estimators._histogram import DEFAULT_QUANTILES, LogHistogram, TokenHistogram, check_quantiles
from osp_diag.estimators.activation import (
    ActivationObservation,
    RowMoments,
    is_constant,
    max_over_strata,
    over_strata,
)
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import TokenCount, maximum_or_nan, per_token

__all__ = [
    "FisherKurtosis",
    "FisherTokenSums",
    "OspExcessKurtosis",
    "OspTokenSums",
    "PearsonKurtosis",
    "RotatedPearsonKurtosis",
    "RotatedTokenSums",
    "fixed_rotation",
    "gaussian_floor",
]

OSP = Source(
    "Park et al. 2025, Outlier-Safe Pre-Training, evaluate_kurtosis.py", "https://arxiv.org/abs/2506.19697"
)
ELHAGE = Source(
    "Elhage et al. 2023, Privileged Bases in the Transformer Residual Stream",
    "https://transformer-circuits.pub/2023/privileged-basis/index.html",
)
KAUL = Source("Kaul et al. 2024, From Attention to Activation", "https://arxiv.org/abs/2410.17174")
COMPOSER = Source(
    "Composer ActivationMonitor",
    "https://github.com/mosaicml/composer/blob/main/composer/callbacks/activation_monitor.py",
)


def gaussian_floor(channels: int) -> float:
    """What the OSP formula gives on Gaussian noise of width d, to 2%.

    The clamp at 0 keeps the upper part of an estimate with mean μ = −6/d + O(d⁻²) and standard
    deviation σ = √(24/d) · (1 + O(1/d)); for a normal law that part has the mean
    σ φ(μ/σ) + μ Φ(μ/σ), which tends to √(24 / (2πd)). 0.141 at d = 128, 0.0416 at d = 2048.
    """
    d = channels
    if d < 4:
        return 0.0
    # μ: 3 (d − 1)/(d + 1) is the mean of m₄/m₂² on Gaussian samples of size d. Bessel's correction in s⁴
    # takes the factor (1 − 1/d)²; the numerator is not centred, which adds 6 x̄²/s², on the average 6/d.
    mean = 3 * (d - 1) / (d + 1) * (1 - 1 / d) ** 2 + 6 / d - 3
    # σ: the exact variance of m₄/m₂² on Gaussian samples.
    deviation = math.sqrt(24 * d * (d - 2) * (d - 3) / ((d + 1) ** 2 * (d + 3) * (d + 5)))
    # The mean of max(0, k) for k ~ N(μ, σ): σ φ(μ/σ) + μ Φ(μ/σ).
    # Why a formula and no table: docs/decisions.md, Estimators.
    z = mean / deviation
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return deviation * density + mean * (1 + math.erf(z / math.sqrt(2))) / 2


def osp_per_token(rows: RowMoments, channels: int) -> Array:
    """max(0, mean_j x_j⁴ / s⁴ − 3), s² centred with Bessel's correction, the numerator not centred."""
    xp = namespace_of(rows.mean)
    # s² = m₂ d/(d − 1); the scale by which x was divided cancels in x⁴ / s⁴.
    variance = rows.central_second * (channels / max(channels - 1, 1))
    constant = is_constant(rows.central_second, rows.mean)
    safe = xp.where(constant, xp.ones_like(variance), variance)
    excess = rows.fourth / (safe * safe) - 3.0
    zero = xp.zeros_like(excess)
    return xp.where(constant, zero, xp.maximum(excess, zero))


def fisher_per_token(rows: RowMoments) -> Array:
    """m₄ / m₂² − 3 with central moments; 0 for a constant token."""
    xp = namespace_of(rows.mean)
    constant = is_constant(rows.central_second, rows.mean)
    safe = xp.where(constant, xp.ones_like(rows.central_second), rows.central_second)
    return xp.where(constant, xp.zeros_like(safe), rows.central_fourth / (safe * safe) - 3.0)


@dataclass(frozen=True)
class OspTokenSums(Measurement):
    """Sum and maximum over tokens of the OSP formula."""

    name = "osp_token_kurtosis"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(("stratum",)), "maximum": Field(("stratum",), "maximum")}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        value = osp_per_token(observation.wide_moments, observation.layout.channels)
        return {
            "total": over_strata(value, observation.strata),
            "maximum": max_over_strata(value, observation.strata),
        }


@dataclass(frozen=True)
class FisherTokenSums(TokenHistogram):
    """Sum and maximum of the excess kurtosis over tokens, and the histogram of excess + 3 ∈ [1, d]."""

    name = "fisher_token_kurtosis"

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        value, strata = fisher_per_token(observation.wide_moments), observation.strata
        return {
            "count": over_strata(namespace_of(value).ones_like(value), strata),
            "total": over_strata(value, strata),
            "maximum": max_over_strata(value, strata),
            "histogram": self.binned(value + 3.0, strata),
        }


_ROTATIONS: dict[tuple[int, int], np.ndarray] = {}


def fixed_rotation(channels: int, seed: int = 0) -> np.ndarray:
    """A random rotation of ``channels`` dimensions, float32, the same for every run with this seed.

    Orthogonal factor of a Gaussian matrix, with the signs that make it uniform (Haar).
    """
    if (channels, seed) not in _ROTATIONS:
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((channels, channels)))
        _ROTATIONS[channels, seed] = (q * np.sign(np.diagonal(r))).astype(np.float32)
    return _ROTATIONS[channels, seed]


@dataclass(frozen=True)
class RotatedTokenSums(Measurement):
    """Sum over tokens of the excess kurtosis after a fixed random rotation of the channels."""

    seed: int = 0
    name = "rotated_token_kurtosis"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        # Drawn here, when the state is made, because a compiled ``measure`` cannot draw it.
        fixed_rotation(layout.channels, self.seed)
        return {"total": Field(("stratum",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.strata)
        rotation = xp.asarray(fixed_rotation(observation.layout.channels, self.seed))
        if hasattr(rotation, "to"):
            rotation = rotation.to(observation.x.device)
        unit = xp.where(observation.peak > 0, observation.peak, xp.ones_like(observation.peak))
        rotated = float32_matmul(observation.x / unit[..., None], rotation)
        rows = observation.reductions.row_moments(rotated)
        return {"total": over_strata(fisher_per_token(rows), observation.strata)}


class OspExcessKurtosis(Estimator):
    """The number that Outlier-Safe Pre-Training reports (its released script, on real sequences).

    Per token over its d channels, k = max(0, mean_j x_j⁴ / s⁴ − 3), where s is the centred standard
    deviation with Bessel's correction while the numerator is *not* centred; then the mean over tokens.
    Because of that it is not shift-invariant: a channel mean of m standard deviations adds 6m² + m⁴.
    So it has no upper bound: noise on an offset of 10 deviations scores about 10,600. The clamp gives
    Gaussian noise a positive score (the floor), and a one-hot token scores d − 3, so values are not
    comparable across widths: compare ``_of_ceiling``, which exceeds 1 where all channels share an offset,
    and ``_over_floor``.
    The script feeds each token as its own sequence (protocol ``osp-published``) and averages over the
    embedding, blocks 1 … L−1 and the final norm's output, never the last block's own output.
    """

    name: ClassVar[str] = "osp_excess_kurtosis"
    title: ClassVar[str] = "Excess kurtosis per token, OSP formula"
    formula: ClassVar[str] = "mean_t max(0, mean_j x_tj⁴ / s_t⁴ − 3), s_t² = Σ_j (x_tj − x̄_t)² / (d − 1)"
    range: ClassVar[str] = "[0, ∞)"
    floor: ClassVar[str] = "0.141 on Gaussian noise at d = 128, 0.042 at 2048; √(24 / (2πd)) for large d"
    ceiling: ClassVar[str] = (
        "none; d − 3 for a token with one non-zero channel, more where all channels share an offset"
    )
    sources: ClassVar[tuple[Source, ...]] = (OSP,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "The paper's 0.04 at d = 2048 is this floor; its 1818.56 is 88.9% of d − 3.",
        "Vlassis et al. 2026 find that over optimizers kurtosis and the max-to-mean ratio fail to predict "
        "what 4 bits cost.",
        "The script's last hidden state of OPT-350m is projected to 512 channels; no site here is that.",
        "Composer's and Kaul's per-token kurtosis centre the numerator (`pearson_kurtosis`).",
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), OspTokenSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        d = layout.channels
        floor, ceiling = gaussian_floor(d), float(d - 3)
        mean = per_token(state, "osp_token_kurtosis.total")
        top = maximum_or_nan(state["osp_token_kurtosis.maximum"])
        unit = namespace_of(mean).ones_like(mean)
        dims = ("stratum",)
        return {
            self.name: Output(mean, dims, definition=self.formula, floor=floor, ceiling=ceiling),
            f"{self.name}_max": Output(
                top, dims, definition="the largest over tokens of the OSP formula", ceiling=ceiling
            ),
            f"{self.name}_of_ceiling": Output(
                quotient(mean, max(ceiling, 0.0) * unit),
                dims,
                definition="mean / (d − 3), the score of a token with one non-zero channel",
            ),
            f"{self.name}_over_floor": Output(
                quotient(mean, floor * unit), dims, definition="mean / (score of Gaussian noise at width d)"
            ),
        }


@dataclass(frozen=True)
class FisherKurtosis(Estimator):
    """Centred excess kurtosis of each token over its channels: mean, maximum and quantiles over tokens.

    Shift-invariant, not clamped: Gaussian noise averages −6/(d + 1). SciPy's ``kurtosis(x, axis=-1)``.
    Quantiles come from a histogram of k + 3 on fixed logarithmic bins a factor 1.022 wide.
    """

    quantiles: tuple[float, ...] = DEFAULT_QUANTILES

    def __post_init__(self) -> None:
        check_quantiles(self.quantiles)

    name: ClassVar[str] = "fisher_kurtosis"
    title: ClassVar[str] = "Excess kurtosis per token, centred (Fisher)"
    formula: ClassVar[str] = "mean_t (m₄ / m₂² − 3), m_p = mean_j (x_tj − x̄_t)^p"
    range: ClassVar[str] = "[−2, d − 5 + 1/(d − 1)]"
    floor: ClassVar[str] = "−6/(d + 1) on Gaussian noise"
    ceiling: ClassVar[str] = "d − 5 + 1/(d − 1), a token with one non-zero channel"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("Fisher 1930; scipy.stats.kurtosis", "https://docs.scipy.org/doc/scipy/reference/stats.html"),
    )
    also_used_by: ClassVar[tuple[str, ...]] = ("pandas and SciPy call this number just “kurtosis”.",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (FisherTokenSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        key, d = FisherTokenSums.name, layout.channels
        quantiles = LogHistogram().quantiles(state[f"{key}.histogram"], self.quantiles) - 3.0
        ceiling = one_hot_pearson(d) - 3.0
        mean = quotient(state[f"{key}.total"], state[f"{key}.count"])
        return {
            self.name: Output(
                mean, ("stratum",), definition=self.formula, floor=-6.0 / (d + 1), ceiling=ceiling
            ),
            f"{self.name}_max": Output(
                maximum_or_nan(state[f"{key}.maximum"]),
                ("stratum",),
                definition="the largest over tokens of m₄ / m₂² − 3",
                ceiling=ceiling,
            ),
            f"{self.name}_quantile": Output(
                quantiles,
                ("stratum", "quantile"),
                definition="quantiles over tokens of m₄ / m₂² − 3",
                coords={"quantile": self.quantiles},
                ceiling=ceiling,
            ),
        }


class PearsonKurtosis(Estimator):
    """Non-excess, centred kurtosis of each token over its channels, mean over tokens: Fisher's plus 3."""

    name: ClassVar[str] = "pearson_kurtosis"
    title: ClassVar[str] = "Kurtosis per token, centred, not excess (Pearson)"
    formula: ClassVar[str] = "mean_t m₄ / m₂², m_p = mean_j (x_tj − x̄_t)^p"
    range: ClassVar[str] = "[1, d − 2 + 1/(d − 1)]"
    floor: ClassVar[str] = "3 (d − 1)/(d + 1) on Gaussian noise"
    ceiling: ClassVar[str] = "d − 2 + 1/(d − 1), a token with one non-zero channel"
    sources: ClassVar[tuple[Source, ...]] = (COMPOSER, ELHAGE, KAUL)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Composer's ActivationMonitor, per token, every monitored module.",
        "Elhage et al.: mean over tokens, per layer; `rotated_pearson_kurtosis` is their control.",
        "Kaul et al.: position 0 and positions > 0 apart (strata `first`, and `delimiter` with `rest`).",
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (FisherTokenSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        key, d = FisherTokenSums.name, layout.channels
        mean = quotient(state[f"{key}.total"], state[f"{key}.count"]) + 3.0
        return {
            self.name: Output(
                mean,
                ("stratum",),
                definition=self.formula,
                floor=3.0 * (d - 1) / (d + 1),
                ceiling=one_hot_pearson(d),
            )
        }


@dataclass(frozen=True)
class RotatedPearsonKurtosis(Estimator):
    """Elhage's control: the same kurtosis after a fixed random rotation of the channels.

    A rotation keeps norms and everything basis-free. If the outliers sit in the basis (channels),
    this falls to about 3 while ``pearson_kurtosis`` stays high; if tokens are heavy-tailed in every
    basis, both stay high. Costs a d × d product per token, hence optional. The rotation is drawn by
    ``init``, which therefore has to come before a compiled ``measure``.
    """

    seed: int = 0

    name: ClassVar[str] = "rotated_pearson_kurtosis"
    title: ClassVar[str] = "Kurtosis per token after a random rotation (control)"
    formula: ClassVar[str] = "mean_t m₄ / m₂² of R x_t, R a fixed random rotation"
    range: ClassVar[str] = "[1, d − 2 + 1/(d − 1)]"
    floor: ClassVar[str] = "3 (d − 1)/(d + 1)"
    ceiling: ClassVar[str] = "≈ 3 unless activations are heavy-tailed in every basis"
    sources: ClassVar[tuple[Source, ...]] = (ELHAGE,)
    optional: ClassVar[bool] = True

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), RotatedTokenSums(self.seed))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = per_token(state, "rotated_token_kurtosis.total") + 3.0
        floor = 3.0 * (layout.channels - 1) / (layout.channels + 1)
        return {self.name: Output(mean, ("stratum",), definition=self.formula, floor=floor)}


def one_hot_pearson(channels: int) -> float:
    """Pearson kurtosis of a token with one non-zero channel: d − 2 + 1/(d − 1), the largest there is."""
    return channels - 2 + 1 / max(channels - 1, 1)
