"""Kurtosis of all the numbers of a sequence at once, tokens and channels pooled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.estimators._arrays import Array, namespace_of
from osp_diag.estimators.activation import ActivationObservation, is_constant
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import SequenceCount, per_sequence

__all__ = ["PooledKurtosis", "PooledSequenceSums"]


@dataclass(frozen=True)
class PooledSequenceSums(Measurement):
    """Sum over sequences of m₄ / (s⁴ + ε), all elements of the stratum pooled; ε in the units of x⁴."""

    epsilon: float = 1e-6
    name = "pooled_kurtosis"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(("stratum",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        pooled = observation.sequences
        xp = namespace_of(pooled.mean)
        # Why by sequence and not by batch: docs/decisions.md, Estimators.
        n = xp.where(pooled.elements > 1, pooled.elements, 2 * xp.ones_like(pooled.elements))
        variance = pooled.central_second * n / (n - 1)  # s², Bessel's correction
        # The moments are of x / scale; dividing ε instead keeps the fourth power of the scale out. Where
        # scale⁴ leaves the accumulator's range on either side, ε is everything or nothing.
        smallest, largest = xp.finfo(variance.dtype).smallest_normal, xp.finfo(variance.dtype).max
        epsilon = xp.clip(self.epsilon / xp.clip(pooled.scale**4, smallest, largest), 0.0, largest)
        constant = is_constant(pooled.central_second, pooled.mean)
        value = pooled.central_fourth / xp.where(constant, xp.ones_like(variance), variance**2 + epsilon)
        value = xp.where(constant, xp.zeros_like(value), value)
        return {"total": xp.sum(value * xp.astype(observation.sequence_valid, value.dtype), axis=-1)}


@dataclass(frozen=True)
class PooledKurtosis(Estimator):
    """Kurtosis of each sequence flattened to T · d numbers, non-excess and centred, mean over sequences.

    A single massive activation makes it grow with the number of *elements*: the ceiling is about
    T · d − 4 (s has Bessel's correction), so on one text SmolLM2-135M scores 136,726 here and 82.9 under
    the OSP formula. Each stratum pools only its own tokens, so the mean over strata is not the number for
    ``all``. ε = 1e-6 is added to s⁴, which makes the number depend on units when activations are tiny. A
    constant sequence gives 0.
    """

    epsilon: float = 1e-6

    name: ClassVar[str] = "pooled_kurtosis"
    title: ClassVar[str] = "Kurtosis of the flattened sequence (Qualcomm)"
    formula: ClassVar[str] = "mean over sequences of mean (x − x̄)⁴ / (s⁴ + 1e-6), over all T · d elements"
    range: ClassVar[str] = "[0, ≈ T · d − 4]"
    floor: ClassVar[str] = "3 on Gaussian noise"
    ceiling: ClassVar[str] = "≈ T · d − 4, a sequence with one non-zero element"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Bondarenko et al. 2023, Quantizable Transformers; outlier-free-transformers",
            "https://arxiv.org/abs/2306.12929",
        ),
    )
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Qualcomm's outlier-free-transformers, then mean (or maximum) over modules.",
        "Qualcomm's code measures OPT's fc2 and final_layer_norm one token at a time, where OPT reshapes to "
        "(T, d): there it is the kurtosis of each token, not of the sequence.",
        "Confusable with every per-token kurtosis, from which it differs by orders of magnitude.",
    )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SequenceCount(), PooledSequenceSums(self.epsilon))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = per_sequence(state, "pooled_kurtosis.total")
        return {self.name: Output(mean, ("stratum",), definition=self.formula, floor=3.0)}
