"""Sizes of tokens: norms, maxima, and how uneven they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, accumulator_dtype, kth_of_few, namespace_of, quotient
from osp_diag.estimators.activation import ActivationObservation, max_over_strata, over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import TokenCount, maximum_or_nan, per_token
from osp_diag.estimators.massive import summed_ratio

__all__ = [
    "GluSpikeRatio",
    "TokenScale",
    "TokenScaleRatioSums",
    "TokenScaleSums",
    "TweoPenalty",
    "TweoSums",
]


@dataclass(frozen=True)
class TokenScaleSums(Measurement):
    """Sum over tokens of the Euclidean norm, and the largest |x|."""

    name = "token_scale"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"norm": Field(("stratum",)), "maximum": Field(("stratum",), "maximum")}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        rows = observation.wide_moments
        # ‖x‖₂ = scale · √(d · mean_j z_j²), where x = scale · z.
        norm = rows.scale * (rows.second * observation.layout.channels) ** 0.5
        return {
            "norm": over_strata(norm, observation.strata),
            "maximum": max_over_strata(rows.scale, observation.strata),
        }


class TokenScale(Estimator):
    """Mean Euclidean norm of a token, largest |x| of all, and how many tokens were counted.

    ``token_count`` leaves out padding and tokens with a NaN or Inf; it is the denominator of every
    mean over tokens. A residual norm of stratum ``first`` far above ``rest`` is the sink token's.
    """

    name: ClassVar[str] = "token_scale"
    title: ClassVar[str] = "Token norm, absolute maximum, token count"
    formula: ClassVar[str] = "mean_t ‖x_t‖₂; max_tj |x_tj|; number of tokens"
    unit: ClassVar[str] = "activation"
    range: ClassVar[str] = "[0, ∞)"
    sources: ClassVar[tuple[Source, ...]] = (
        Source("Guo et al. 2024, Active-Dormant Attention Heads", "https://arxiv.org/abs/2410.13835"),
        Source("Kaul et al. 2024, From Attention to Activation", "https://arxiv.org/abs/2410.17174"),
    )
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Guo et al.: residual norm of the sink token against the others.",
        "Kaul et al.: max |x| at position 0 and at positions > 0 apart, the mean over tokens of each token's "
        "maximum (`token_peak`), not the maximum of all.",
        "`infinity_norm` averages the maximum over sequences; `absolute_maximum` does not.",
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), TokenScaleSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        stratum = ("stratum",)
        maximum = maximum_or_nan(state["token_scale.maximum"])
        return {
            "token_norm": Output(
                per_token(state, "token_scale.norm"), stratum, "activation", "mean over tokens of ‖x_t‖₂"
            ),
            "absolute_maximum": Output(maximum, stratum, "activation", "max |x| over tokens and channels"),
            "token_count": Output(
                1.0 * state["token.count"],
                stratum,
                "tokens",
                "tokens counted: neither padding nor NaN or Inf",
            ),
        }


@dataclass(frozen=True)
class TokenScaleRatioSums(Measurement):
    """Sum over sequences of max_t s_t / median_t s_t, where s_t = max_j |x_tj| is a token's scale."""

    name = "token_scale_ratio"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(()), "count": Field(())}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        peak, length = observation.peak, observation.layout.tokens
        xp = namespace_of(peak)
        wide = accumulator_dtype(xp, peak)
        count = xp.astype(observation.tokens_per_sequence, xp.int32)
        # Tokens left out are zeros and sort first.
        rank = xp.where(count > 0, length - count + (count - 1) // 2, xp.zeros_like(count))
        median = kth_of_few(peak, rank)
        return summed_ratio(xp.astype(xp.max(peak, axis=-1), wide), xp.astype(median, wide))


class GluSpikeRatio(Estimator):
    """Largest token scale over the median token scale of a sequence, mean over sequences.

    A token's scale is its max_j |x_tj|, what a per-token quantizer would use; a module with a large
    ratio has spikes on few tokens (Yang et al., at the input of down_proj). The median is the lower
    one; a sequence whose median scale is 0 is left out.
    """

    name: ClassVar[str] = "glu_spike_ratio"
    title: ClassVar[str] = "GLU spikes: max to median of token scales (Yang)"
    formula: ClassVar[str] = "mean over sequences of max_t s_t / median_t s_t, s_t = max_j |x_tj|"
    range: ClassVar[str] = "[1, ∞)"
    floor: ClassVar[str] = "1"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Yang et al. 2024, Mitigating Quantization Errors Due to Activation Spikes in GLU-Based LLMs",
            "https://arxiv.org/abs/2405.14428",
        ),
    )
    also_used_by: ClassVar[tuple[str, ...]] = (
        "QFeM leaves modules above a ratio unquantized.",
        "Confusable with `max_median_ratio`, which is over the channels of one token.",
    )
    sites: ClassVar[tuple[str, ...]] = ("mlp_hidden",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenScaleRatioSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        ratio = quotient(state["token_scale_ratio.total"], state["token_scale_ratio.count"])
        return {self.name: Output(ratio, (), definition=self.formula, floor=1.0)}


@dataclass(frozen=True)
class TweoSums(Measurement):
    """Sum over tokens of mean_j (|x_tj| / (τ + ε))⁴."""

    threshold: float = 3.0
    epsilon: float = 1e-6
    name = "tweo"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(("stratum",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        rows = observation.wide_moments
        # mean_j (|x_j| / (τ + ε))⁴ = (scale / (τ + ε))⁴ · mean_j z_j⁴, where x = scale · z.
        ratio = rows.scale / (self.threshold + self.epsilon)
        return {"total": over_strata(ratio**4 * rows.fourth, observation.strata)}


@dataclass(frozen=True)
class TweoPenalty(Estimator):
    """The penalty that TWEO adds to the loss, measured on a model trained with or without it.

    ``threshold`` is the paper's τ (2 to 5): activations well below it cost nothing, those above cost
    the fourth power. Per block; the paper's term is the mean over block outputs.
    """

    threshold: float = 3.0

    name: ClassVar[str] = "tweo_penalty"
    title: ClassVar[str] = "TWEO penalty"
    formula: ClassVar[str] = "mean_tj (|x_tj| / (τ + 1e-6))⁴, τ = 3"
    range: ClassVar[str] = "[0, ∞)"
    floor: ClassVar[str] = "3σ⁴/τ⁴ on Gaussian noise of deviation σ: 0.037 at σ = 1, τ = 3"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Liang et al. 2025, TWEO: Transformers Without Extreme Outliers",
            "https://arxiv.org/abs/2511.23225",
        ),
    )
    sites: ClassVar[tuple[str, ...]] = ("embedding", "residual_*")

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise EstimatorError(f"threshold must be positive; got {self.threshold}")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), TweoSums(self.threshold))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        definition = f"mean of (|x| / ({self.threshold:g} + 1e-6))⁴"
        return {self.name: Output(per_token(state, "tweo.total"), ("stratum",), definition=definition)}
