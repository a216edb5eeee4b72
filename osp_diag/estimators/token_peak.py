"""The largest channel of each token: its mean over tokens, and how far it stands above the token's RMS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.estimators._arrays import Array, namespace_of
from osp_diag.estimators.activation import ActivationObservation, max_over_strata, over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import TokenCount, maximum_or_nan, per_token

__all__ = ["PeakRmsRatio", "TokenPeak"]

KAUL = Source("Kaul et al. 2024, From Attention to Activation", "https://arxiv.org/abs/2410.17174")


@dataclass(frozen=True)
class TokenPeakSums(Measurement):
    """Sums over tokens of max_j |x_tj|, and sum and maximum of its ratio to the token's RMS."""

    name = "token_peak"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "peak": Field(("stratum",)),
            "ratio": Field(("stratum",)),
            "ratio_maximum": Field(("stratum",), "maximum"),
        }

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        rows, strata = observation.wide_moments, observation.strata
        xp = namespace_of(rows.second)
        # Moments are of x / max |x|, so that the largest channel is 1 and its ratio to the RMS is 1 / RMS.
        safe = xp.where(rows.second > 0, rows.second, xp.ones_like(rows.second))
        ratio = 1.0 / xp.sqrt(safe)
        return {
            "peak": over_strata(rows.scale, strata),
            "ratio": over_strata(ratio, strata),
            "ratio_maximum": max_over_strata(ratio, strata),
        }


class TokenPeak(Estimator):
    """Mean over tokens of each token's largest magnitude.

    ``absolute_maximum`` is the largest of all tokens, ``infinity_norm`` the mean of the largest of each
    sequence: the three differ by orders of magnitude where few tokens hold massive activations.
    """

    name: ClassVar[str] = "token_peak"
    title: ClassVar[str] = "Largest magnitude of a token"
    formula: ClassVar[str] = "mean_t max_j |x_tj|"
    unit: ClassVar[str] = "activation"
    range: ClassVar[str] = "[0, ∞)"
    sources: ClassVar[tuple[Source, ...]] = (KAUL,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Kaul et al.: position 0 and positions > 0 apart (strata `first`, and `delimiter` with `rest`).",
        "What a per-token quantizer scales by, on the average.",
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), TokenPeakSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = per_token(state, "token_peak.peak")
        return {self.name: Output(mean, ("stratum",), self.unit, self.formula, floor=0.0)}


class PeakRmsRatio(Estimator):
    """Crest factor: the largest magnitude of a token over its root mean square, mean and maximum over tokens.

    1 where all channels are equally large, √d where one channel holds everything; a token of zeros counts as
    1. Unlike the max/median ratio it has a ceiling. What absolute-maximum quantization loses of a token's
    range.
    """

    name: ClassVar[str] = "peak_rms_ratio"
    title: ClassVar[str] = "Crest factor of a token"
    formula: ClassVar[str] = "mean_t max_j |x_tj| / √(mean_j x_tj²)"
    range: ClassVar[str] = "[1, √d]"
    floor: ClassVar[str] = "1, all channels equally large; about √(2 ln d) on Gaussian noise"
    ceiling: ClassVar[str] = "√d, a token with one non-zero channel"
    sources: ClassVar[tuple[Source, ...]] = (Source("The crest factor of signal processing, over channels"),)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenCount(), TokenPeakSums())

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        bounds = {"floor": 1.0, "ceiling": layout.channels**0.5}
        mean, top = per_token(state, "token_peak.ratio"), maximum_or_nan(state["token_peak.ratio_maximum"])
        return {
            self.name: Output(mean, ("stratum",), definition=self.formula, **bounds),
            f"{self.name}_max": Output(
                top, ("stratum",), definition="the largest over tokens of max |x| / RMS", **bounds
            ),
        }
