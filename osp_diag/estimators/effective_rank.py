"""In how many directions the tokens of a sequence lie: entropy and rank of their Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, quotient
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["EffectiveRank"]

SKEAN = Source(
    "Skean et al. 2025, Layer by Layer: Uncovering Hidden Representations in Language Models",
    "https://arxiv.org/abs/2502.02013",
)
ROY = Source("Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality")


@dataclass(frozen=True)
class GramEntropySums(Measurement):
    """Σ over sequences of the exponential of the entropy of the eigenvalues of X Xᵀ / tr X Xᵀ."""

    name = "gram_entropy"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"rank": Field(()), "count": Field(())}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.x)
        wide = accumulator_dtype(xp, observation.x)
        counted = observation.strata[0, ...] * xp.astype(observation.peak > 0, observation.strata.dtype)
        peak = xp.max(observation.peak * counted, axis=-1)
        holds = xp.astype(peak > 0, wide)
        scale = xp.where(peak > 0, peak, xp.ones_like(peak))
        # Divided by the largest element first: squares of what is left neither overflow nor all vanish.
        z = xp.astype(observation.x / scale[:, None, None] * counted[..., None], wide)
        tokens, channels = z.shape[1:]
        other = xp.matrix_transpose(z)
        gram = xp.matmul(z, other) if tokens <= channels else xp.matmul(other, z)
        share = xp.linalg.eigvalsh(gram)
        share = xp.where(share > 0, share, xp.zeros_like(share))
        total = xp.sum(share, axis=-1, keepdims=True)
        share = share / xp.where(total > 0, total, xp.ones_like(total))
        entropy = -xp.sum(share * xp.log(xp.where(share > 0, share, xp.ones_like(share))), axis=-1)
        return {
            "rank": xp.sum(xp.exp(entropy) * holds),
            "count": xp.sum(holds),
        }


class EffectiveRank(Estimator):
    """Effective rank of a sequence's tokens: the exponential of the entropy of their Gram matrix.

    With λ the eigenvalues of X Xᵀ of one sequence (not centred) divided by their sum: the matrix entropy
    −Σ λ log λ, and its exponential, the number of directions in use: 1 if all tokens are parallel, as where
    one massive activation dwarfs everything, min(n, d) if they are orthogonal and equally long. Of all
    tokens; a sequence of zeros is left out. The logarithm of one sequence's is its matrix entropy in nats,
    which near 0 single precision (JAX) would not give to more than six decimals. Takes the eigenvalues of a
    matrix a sequence, hence optional.
    """

    name: ClassVar[str] = "effective_rank"
    title: ClassVar[str] = "Effective rank of a sequence (matrix entropy)"
    formula: ClassVar[str] = "mean over sequences of exp(−Σ_i λ_i log λ_i), λ = eigenvalues of X Xᵀ / tr X Xᵀ"
    unit: ClassVar[str] = "directions"
    range: ClassVar[str] = "[1, min(n, d)]"
    floor: ClassVar[str] = "1, all tokens parallel"
    ceiling: ClassVar[str] = "min(n, d), tokens orthogonal and equally long"
    sources: ClassVar[tuple[Source, ...]] = (ROY, SKEAN)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Confusable with `participation_ratio`, which counts channels, not directions.",
    )
    sites: ClassVar[tuple[str, ...]] = ("embedding", "residual_*", "final_norm")
    optional: ClassVar[bool] = True

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (GramEntropySums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        count = state["gram_entropy.count"]
        return {
            "effective_rank": Output(
                quotient(state["gram_entropy.rank"], count), (), self.unit, self.formula, floor=1.0
            ),
        }
