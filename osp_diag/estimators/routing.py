"""Routing in a mixture of experts: how sure the router is, how evenly it uses the experts, what they give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, quotient
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Observes, Output, Source
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.schema import ROUTER, STRATA

__all__ = ["ExpertLoad", "ExpertOutputMaximum", "RouterEntropy", "RoutingObservation"]

SHAZEER = Source(
    "Shazeer et al. 2017, Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    "https://arxiv.org/abs/1701.06538",
)


class RoutingObservation:
    """What is known of one layer's routing at one moment; what is not, is None.

    Parameters
    ----------
    strata : (stratum, batch, token) of 0 and 1, in the order of ``stratum_names``; padding is 0 in all
    experts : how many there are
    logits : (batch, token, expert) of the router, before its softmax, up to a constant a token
    choice : (batch, token, expert), 1 where a token is sent to an expert
    peaks : (batch, token, expert), max |y| of what an expert's down projection gives for a token; −Inf where
        the token is not sent to it

    A token with NaN or Inf among its logits has no entropy, and one that an expert gives NaN no maximum.
    Raises :class:`~osp_diag.errors.EstimatorError` for other shapes.
    """

    def __init__(
        self,
        strata: Float[Any, "stratum batch token"],
        experts: int,
        *,
        stratum_names: tuple[str, ...] = STRATA,
        logits: Float[Any, "batch token expert"] | None = None,
        choice: Float[Any, "batch token expert"] | None = None,
        peaks: Float[Any, "batch token expert"] | None = None,
    ) -> None:
        xp = namespace_of(strata)
        expected = (*strata.shape[1:], experts)
        for name, array in (("logits", logits), ("choice", choice), ("peaks", peaks)):
            if array is not None and tuple(array.shape) != expected:
                raise EstimatorError(
                    f"the router's {name} have shape {tuple(array.shape)}, expected one number for each "
                    f"token and expert: {expected}"
                )
        self.strata = xp.astype(strata, xp.float32)
        self.logits, self.choice, self.peaks = logits, choice, peaks
        self.layout = Layout(experts=experts, tokens=strata.shape[-1], strata=stratum_names)

    def nothing(self, *dims: int) -> Array:
        """Zeros of a shape, where states are."""
        xp = namespace_of(self.strata)
        wide = accumulator_dtype(xp, self.strata)
        zero = xp.astype(xp.sum(self.strata[:, :0, :0]), wide)
        return xp.broadcast_to(zero, dims)


def _by_stratum(strata: Array, values: Array) -> Array:
    """(stratum, batch, token), (batch, token, expert) → sums (stratum, expert)."""
    xp = namespace_of(values)
    wide = accumulator_dtype(xp, values)
    return xp.stack(
        [xp.sum(strata[s, ..., None] * values, axis=(0, 1), dtype=wide) for s in range(strata.shape[0])]
    )


@dataclass(frozen=True)
class RouterSoftmaxSums(Measurement):
    """Σ over tokens of the entropy of softmax(logits), and of its probabilities."""

    name = "router_softmax"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "entropy": Field(("stratum",)),
            "probability": Field(("stratum", "expert")),
            "count": Field(("stratum",)),
        }

    def measure(self, observation: RoutingObservation) -> Mapping[str, Array]:
        strata, logits = observation.strata, observation.logits
        parts, experts = len(observation.layout.strata), observation.layout.experts
        if logits is None:
            nothing = observation.nothing(parts)
            return {
                "entropy": nothing,
                "probability": observation.nothing(parts, experts),
                "count": nothing,
            }
        xp = namespace_of(logits)
        wide = accumulator_dtype(xp, strata)
        values = xp.astype(logits, wide)
        finite = xp.all(xp.isfinite(values), axis=-1)
        values = xp.where(finite[..., None], values, xp.zeros_like(values))
        values = values - xp.max(values, axis=-1, keepdims=True)
        weight = xp.exp(values)
        total = xp.sum(weight, axis=-1, keepdims=True)
        probability = weight / total
        # −Σ p log p = log Σ e^z − Σ p z, of logits whose largest is 0.
        entropy = xp.log(total[..., 0]) - xp.sum(probability * values, axis=-1)
        counted = xp.astype(strata, wide) * xp.astype(finite, wide)
        return {
            "entropy": xp.sum(counted * entropy, axis=(1, 2)),
            "probability": _by_stratum(counted, probability),
            "count": xp.sum(counted, axis=(1, 2)),
        }


@dataclass(frozen=True)
class ExpertTokenCount(Measurement):
    """How many tokens are sent to each expert, and how many there are."""

    name = "expert_token"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"sent": Field(("stratum", "expert")), "count": Field(("stratum",))}

    def measure(self, observation: RoutingObservation) -> Mapping[str, Array]:
        strata, choice = observation.strata, observation.choice
        if choice is None:
            parts = len(observation.layout.strata)
            return {
                "sent": observation.nothing(parts, observation.layout.experts),
                "count": observation.nothing(parts),
            }
        xp = namespace_of(strata)
        sent = _by_stratum(strata, xp.astype(choice, xp.float32))
        return {"sent": sent, "count": xp.sum(strata, axis=(1, 2))}


@dataclass(frozen=True)
class ExpertPeak(Measurement):
    """The largest |y| that each expert's down projection gives."""

    name = "expert_peak"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"maximum": Field(("stratum", "expert"), "maximum")}

    def measure(self, observation: RoutingObservation) -> Mapping[str, Array]:
        strata, peaks = observation.strata, observation.peaks
        if peaks is None:
            nothing = observation.nothing(len(observation.layout.strata), observation.layout.experts)
            return {"maximum": nothing - namespace_of(nothing).inf}
        xp = namespace_of(peaks)
        none = xp.full_like(peaks, -xp.inf)
        finite = xp.where(xp.isfinite(peaks), peaks, none)
        tops = [
            xp.max(xp.where(strata[s, ..., None] > 0, finite, none), axis=(0, 1))
            for s in range(strata.shape[0])
        ]
        return {"maximum": xp.stack(tops)}


@dataclass(frozen=True)
class RouterEntropy(Estimator):
    """Entropy of the router's softmax over experts: of a token on the average, and of the mean distribution.

    The first is low where the router is sure of each token, the second where few experts get everything: a
    router that is sure and balanced has a low and a high one. Natural logarithms, over *all* experts, of the
    softmax of the router's logits also where the model scores by a sigmoid, adds a bias before it chooses
    (DeepSeek-V3), or takes the softmax over the chosen alone (gpt-oss).
    """

    name: ClassVar[str] = "router_entropy"
    title: ClassVar[str] = "Entropy of the router"
    formula: ClassVar[str] = "mean over tokens of −Σ_e p_te log p_te, p_t = softmax of the router's logits"
    unit: ClassVar[str] = "nat"
    range: ClassVar[str] = "[0, ln E] for E experts"
    floor: ClassVar[str] = "0, all on one expert"
    ceiling: ClassVar[str] = "ln E, all experts alike"
    sources: ClassVar[tuple[Source, ...]] = (SHAZEER,)
    observes: ClassVar[Observes] = "routing"
    sites: ClassVar[tuple[str, ...]] = (ROUTER,)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (RouterSoftmaxSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        count = state["router_softmax.count"]
        xp = namespace_of(count)
        mean = quotient(state["router_softmax.probability"], count[..., None])
        logarithm = xp.log(xp.where(mean > 0, mean, xp.ones_like(mean)))
        ceiling = log(layout.experts)
        return {
            self.name: Output(
                quotient(state["router_softmax.entropy"], count),
                ("stratum",),
                unit=self.unit,
                definition=self.formula,
                floor=0.0,
                ceiling=ceiling,
            ),
            "router_mean_entropy": Output(
                -xp.sum(mean * logarithm, axis=-1),
                ("stratum",),
                unit=self.unit,
                definition="−Σ_e p̄_e log p̄_e, p̄ = mean over tokens of the router's softmax",
                floor=0.0,
                ceiling=ceiling,
            ),
        }


@dataclass(frozen=True)
class ExpertLoad(Estimator):
    """Share of the tokens that each expert gets, by the model's own choice, and how uneven the shares are.

    The shares sum to the number of experts that a token is sent to. The coefficient of variation is the one
    that Shazeer et al. square for their loss: the standard deviation over experts (not Bessel's) by the
    mean. Experts that every token passes beside the router (shared ones) are not counted.
    """

    name: ClassVar[str] = "expert_load"
    title: ClassVar[str] = "Load of the experts"
    formula: ClassVar[str] = "tokens that are sent to expert e / tokens"
    range: ClassVar[str] = (
        "[0, 1]; the coefficient of variation [0, √(E − 1)], the largest over the mean [1, E]"
    )
    floor: ClassVar[str] = "0; both of the last at their floor where all experts get the same"
    sources: ClassVar[tuple[Source, ...]] = (SHAZEER,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Largest over mean load, less 1, is DeepSeek's MaxVio (Wang et al. 2024, arXiv:2408.15664).",
    )
    observes: ClassVar[Observes] = "routing"
    sites: ClassVar[tuple[str, ...]] = (ROUTER,)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (ExpertTokenCount(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        load = quotient(state["expert_token.sent"], state["expert_token.count"][..., None])
        xp = namespace_of(load)
        mean = xp.mean(load, axis=-1)
        spread = xp.sqrt(xp.mean((load - mean[..., None]) ** 2, axis=-1))
        experts = float(layout.experts)
        return {
            self.name: Output(load, ("stratum", "expert"), definition=self.formula, floor=0.0, ceiling=1.0),
            "expert_load_variation": Output(
                quotient(spread, mean),
                ("stratum",),
                definition="standard deviation over experts of their load / mean load",
                floor=0.0,
                ceiling=(experts - 1) ** 0.5,
            ),
            "expert_load_max": Output(
                quotient(xp.max(load, axis=-1), mean),
                ("stratum",),
                definition="largest load of an expert / mean load",
                floor=1.0,
                ceiling=experts,
            ),
        }


@dataclass(frozen=True)
class ExpertOutputMaximum(Estimator):
    """The largest magnitude that each expert's down projection gives, before the router's weight.

    Over the tokens that are sent to the expert; NaN of one that none is sent to.
    """

    name: ClassVar[str] = "expert_output_maximum"
    title: ClassVar[str] = "Largest output of each expert"
    formula: ClassVar[str] = "max over tokens t sent to expert e and channels j of |y_tej|, y = W_down h + b"
    unit: ClassVar[str] = "activation"
    range: ClassVar[str] = "[0, ∞)"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Su et al. 2025, Unveiling Super Experts in Mixture-of-Experts Large Language Models",
            "https://arxiv.org/abs/2507.23279",
        ),
    )
    observes: ClassVar[Observes] = "routing"
    sites: ClassVar[tuple[str, ...]] = (ROUTER,)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (ExpertPeak(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        return {
            self.name: Output(
                maximum_or_nan(state["expert_peak.maximum"]),
                ("stratum", "expert"),
                self.unit,
                self.formula,
                floor=0.0,
            )
        }
