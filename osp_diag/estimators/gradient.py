"""Gradients of the loss with respect to the activations of a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, quotient
from osp_diag.estimators.activation import ActivationObservation, max_over_strata, over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.estimators.token_kurtosis import fisher_per_token
from osp_diag.schema import GRADIENT

__all__ = ["ActivationGradient", "GradientSums"]

UNIT = "loss / activation"


@dataclass(frozen=True)
class GradientSums(Measurement):
    """Sums over the tokens that the loss depends on, and how many it does not depend on."""

    name = "gradient"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        sums = ("count", "zero", "nonfinite", "square", "kurtosis")
        return {key: Field(("stratum",)) for key in sums} | {"maximum": Field(("stratum",), "maximum")}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        rows, strata = observation.wide_moments, observation.strata
        xp = namespace_of(rows.scale)
        one = xp.ones_like(rows.scale)
        depends = xp.astype(rows.scale > 0, strata.dtype)
        reached = strata * depends[None, ...]
        bad = xp.astype(~observation.finite_token, accumulator_dtype(xp, strata))
        return {
            "count": over_strata(one, reached),
            "zero": over_strata(one, strata * (1 - depends)[None, ...]),
            "nonfinite": over_strata(bad, observation.raw_strata),
            # mean_j g_j² = scale² · mean_j z_j², where g = scale · z.
            "square": over_strata(rows.scale * rows.scale * rows.second, reached),
            "kurtosis": over_strata(fisher_per_token(rows), reached),
            "maximum": max_over_strata(rows.scale, strata),
        }


class ActivationGradient(Estimator):
    """Size and kurtosis of g = ∂L/∂x at a site: root mean square, excess kurtosis per token, largest |g|.

    Measured in the backward pass of a training step, where it is asked for (``gradients=True``); the run's
    attribute ``gradient_of`` says of which loss. The gradient is that of the very tensor which the site
    reads, along every path from it. Tokens that the loss does not depend on (their gradient is exactly 0, as
    at the last position) are no part of root mean square and kurtosis, and ``gradient_zero_share`` says how
    many they are. The kurtosis is that of ``fisher_kurtosis``: centred, over
    the channels of a token, mean over tokens. Compare strata: where the first token takes much attention, its
    gradient is a sum over all queries that look at it.
    """

    name: ClassVar[str] = "gradient"
    title: ClassVar[str] = "Gradient with respect to an activation"
    formula: ClassVar[str] = "√(mean_tj g_tj²); mean_t [m₄ / m₂² − 3]; max_tj |g_tj|; g = ∂L/∂x"
    unit: ClassVar[str] = UNIT
    range: ClassVar[str] = "[0, ∞); kurtosis [−2, d − 3]; shares [0, 1]"
    floor: ClassVar[str] = "kurtosis 0 on Gaussian noise"
    ceiling: ClassVar[str] = "kurtosis about d − 3, a token whose gradient is in one channel"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Attention Sinks Induce Gradient Sinks (2026), gradients of the first token",
            "https://arxiv.org/abs/2603.17771",
        ),
    )
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Confusable with the gradient of weights, of which the loop's `gradient_norm` is the norm.",
    )
    sites: ClassVar[tuple[str, ...]] = (f"{GRADIENT}*",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (GradientSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        count, zero = state["gradient.count"], state["gradient.zero"]
        xp = namespace_of(count)
        stratum = ("stratum",)
        return {
            "gradient_rms": Output(
                xp.sqrt(quotient(state["gradient.square"], count)),
                stratum,
                UNIT,
                "√(mean of (∂L/∂x)² over channels and the tokens that the loss depends on)",
                floor=0.0,
            ),
            "gradient_excess_kurtosis": Output(
                quotient(state["gradient.kurtosis"], count),
                stratum,
                definition="mean over the tokens that the loss depends on of m₄ / m₂² − 3 of ∂L/∂x",
                floor=-2.0,
                ceiling=float(layout.channels - 3),
            ),
            "gradient_absolute_maximum": Output(
                maximum_or_nan(state["gradient.maximum"]),
                stratum,
                UNIT,
                "max |∂L/∂x| over tokens and channels",
                floor=0.0,
            ),
            "gradient_zero_share": Output(
                quotient(zero, zero + count),
                stratum,
                definition="share of tokens whose gradient is 0 in every channel",
                floor=0.0,
                ceiling=1.0,
            ),
            "gradient_nonfinite_count": Output(
                1.0 * state["gradient.nonfinite"],
                stratum,
                "tokens",
                "tokens with NaN or Inf in their gradient, which are left out of the others",
                floor=0.0,
            ),
        }
