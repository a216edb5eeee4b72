"""Max to median ratio of a token over its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, quotient
from osp_diag.estimators._histogram import DEFAULT_QUANTILES, LogHistogram, TokenHistogram, check_quantiles
from osp_diag.estimators.activation import ActivationObservation, is_constant, max_over_strata, over_strata
from osp_diag.estimators.base import Estimator, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import TokenCount, maximum_or_nan

__all__ = ["CentredMaxMedianRatio", "MaxMedianRatio", "MaxMedianSums"]

HE = Source(
    "He et al. 2024, Understanding and Minimising Outlier Features", "https://arxiv.org/abs/2405.19279"
)


@dataclass(frozen=True)
class MaxMedianSums(TokenHistogram):
    """Sum, maximum and histogram over tokens of max |x| / median |x|, where the median is not 0."""

    centred: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return "centred_max_median" if self.centred else "max_median"

    @property
    def reads_elements(self) -> bool:  # type: ignore[override]
        """Centring asks for a second median, of other numbers."""
        return self.centred

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        peak, median = self._extent(observation)
        xp = namespace_of(peak)
        wide = accumulator_dtype(xp, peak)
        defined = median > 0
        safe = xp.where(defined, median, xp.ones_like(median))
        # In float32 (JAX) a huge ratio would be Inf; the largest finite number keeps the sum defined.
        ratio = xp.clip(xp.astype(peak, wide) / xp.astype(safe, wide), 1.0, xp.finfo(wide).max)
        strata = observation.strata * xp.astype(defined, observation.strata.dtype)[None, ...]
        return {
            "count": over_strata(xp.ones_like(ratio), strata),
            "total": over_strata(xp.where(defined, ratio, xp.zeros_like(ratio)), strata),
            "maximum": max_over_strata(ratio, strata),
            "histogram": self.binned(ratio, strata),
        }

    def _extent(self, observation: ActivationObservation) -> tuple[Any, Any]:
        if not self.centred:
            return observation.peak, observation.median
        xp = namespace_of(observation.strata)
        # Centred values can have all 31 bits, whatever dtype x came in: the median looks at all of them.
        centred = observation.x - observation.row_mean[..., None]
        median = observation.reductions.row_median(centred, 31)
        rows = observation.moments
        median = xp.where(is_constant(rows.central_second, rows.mean), xp.zeros_like(median), median)
        return xp.max(xp.abs(centred), axis=-1), median


def _outputs(
    state: Mapping[str, Array],
    measurement: MaxMedianSums,
    stem: str,
    formula: str,
    quantiles: tuple[float, ...],
) -> dict[str, Output]:
    key = measurement.name
    count = state[f"{key}.count"]
    return {
        stem: Output(quotient(state[f"{key}.total"], count), ("stratum",), definition=formula, floor=1.0),
        f"{stem}_max": Output(
            maximum_or_nan(state[f"{key}.maximum"]),
            ("stratum",),
            definition="the largest over tokens of max / median",
            floor=1.0,
        ),
        f"{stem}_quantile": Output(
            LogHistogram().quantiles(state[f"{key}.histogram"], quantiles),
            ("stratum", "quantile"),
            definition="quantiles over tokens of max / median, at most 2²⁰",
            coords={"quantile": quantiles},
            floor=1.0,
        ),
        f"{stem}_undefined_count": Output(
            state["token.count"] - count, ("stratum",), "tokens", "tokens whose median is 0, left out"
        ),
    }


@dataclass(frozen=True)
class MaxMedianRatio(Estimator):
    """max |x| / median |x| over the channels of a token, mean over tokens (MMR).

    The median is exact: the lower of the two middle values when d is even (torch's convention; NumPy
    takes their mean). Tokens whose median is 0, as after a ReLU, have no ratio: they are left out and
    counted in ``max_median_ratio_undefined_count``. Quantiles come from a histogram whose bins are a
    factor 1.022 wide. Gaussian noise gives somewhat less than √(2 log d) / 0.6745.
    """

    quantiles: tuple[float, ...] = DEFAULT_QUANTILES

    name: ClassVar[str] = "max_median_ratio"
    title: ClassVar[str] = "Max to median ratio (MMR)"
    formula: ClassVar[str] = "mean_t max_j |x_tj| / median_j |x_tj|"
    range: ClassVar[str] = "[1, ∞)"
    floor: ClassVar[str] = (
        "5.0 on Gaussian noise at d = 768; below √(2 log d) / 0.6745, which it nears slowly"
    )
    sources: ClassVar[tuple[Source, ...]] = (HE,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "He et al.'s code takes it on X centred over the width: `centred_max_median_ratio`.",
        "Vlassis et al. (arXiv 2509.23500) write MMR for a max-to-*mean* ratio, which over optimizers fails "
        "to predict the accuracy after quantization, as kurtosis does.",
        "Confusable with `peak_median_ratio` (a whole sequence) and `glu_spike_ratio` (token scales).",
    )

    def __post_init__(self) -> None:
        check_quantiles(self.quantiles)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), MaxMedianSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        return _outputs(state, MaxMedianSums(), self.name, self.formula, self.quantiles)


@dataclass(frozen=True)
class CentredMaxMedianRatio(Estimator):
    """The max to median ratio of x minus its mean over the token's channels, as in He's code.

    Differs from ``max_median_ratio`` where tokens have a mean: a common shift raises the median of
    |x| and hides outliers there, and is removed here. A constant token has no ratio. Needs a second
    exact median, hence optional.
    """

    quantiles: tuple[float, ...] = DEFAULT_QUANTILES

    name: ClassVar[str] = "centred_max_median_ratio"
    title: ClassVar[str] = "Max to median ratio of the centred token"
    formula: ClassVar[str] = "mean_t max_j |x_tj − x̄_t| / median_j |x_tj − x̄_t|"
    range: ClassVar[str] = "[1, ∞)"
    floor: ClassVar[str] = "below √(2 log d) / 0.6745 on Gaussian noise"
    sources: ClassVar[tuple[Source, ...]] = (HE,)
    also_used_by: ClassVar[tuple[str, ...]] = ("He et al.'s released code logs this one as MMR.",)
    optional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_quantiles(self.quantiles)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), MaxMedianSums(centred=True))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        return _outputs(state, MaxMedianSums(centred=True), self.name, self.formula, self.quantiles)
