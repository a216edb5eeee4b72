"""How many tokens and sequences were counted: the denominators that the other statistics share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, quotient
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.base import Field, Layout, Measurement

__all__ = ["SequenceCount", "TokenCount", "maximum_or_nan", "per_sequence", "per_token"]


@dataclass(frozen=True)
class TokenCount(Measurement):
    """Number of counted tokens of each stratum: neither padding nor with a NaN or Inf."""

    name = "token"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"count": Field(("stratum",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        return {"count": namespace_of(observation.strata).sum(observation.strata, axis=(1, 2))}


@dataclass(frozen=True)
class SequenceCount(Measurement):
    """Number of sequences with at least one counted token of the stratum."""

    name = "sequence"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"count": Field(("stratum",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.strata)
        wide = accumulator_dtype(xp, observation.strata)
        return {"count": xp.sum(xp.astype(observation.sequence_valid, wide), axis=-1)}


def per_token(state: Mapping[str, Array], field: str) -> Array:
    """A sum over (…, stratum) divided by the stratum's tokens; NaN where there are none."""
    return quotient(state[field], state["token.count"])


def per_sequence(state: Mapping[str, Array], field: str) -> Array:
    """A sum over (…, stratum) divided by the stratum's sequences; NaN where there are none."""
    return quotient(state[field], state["sequence.count"])


def maximum_or_nan(values: Array) -> Array:
    """A maximum, NaN where nothing was counted."""
    xp = namespace_of(values)
    return xp.where(values > -xp.inf, values, xp.nan * xp.ones_like(values))
