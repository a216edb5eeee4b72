"""Secondary sinks: tokens whose state points where the first token's does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, index_range, namespace_of, quotient
from osp_diag.estimators.activation import ActivationObservation, over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.counts import SequenceCount

__all__ = ["FirstTokenAlignment", "SecondarySinks"]


@dataclass(frozen=True)
class FirstTokenAlignment(Measurement):
    """Cosines of every other token's state with that of its sequence's first token."""

    cosine: float = 0.9
    name = "first_token_alignment"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {name: Field(("stratum",)) for name in ("aligned", "total", "count")}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        x, scale = observation.x, observation.peak
        xp = namespace_of(x)
        batch, tokens, channels = x.shape
        # Divided by its largest magnitude first, so that no square leaves the range.
        z = x / xp.where(scale > 0, scale, xp.ones_like(scale))[..., None]
        norm = xp.sqrt(xp.sum(z * z, axis=-1))
        z = z / xp.where(norm > 0, norm, xp.ones_like(norm))[..., None]
        start = observation.start[:, None]
        index = xp.broadcast_to(start[..., None], (batch, 1, channels))
        cosine = xp.sum(z * xp.take_along_axis(z, index, axis=1), axis=-1)
        # A first token that is left out, or is 0, has no direction.
        is_other = index_range(0, tokens, x)[None, :] != start
        has_direction = (norm > 0) & (xp.take_along_axis(norm, start, axis=-1) > 0)
        compared = xp.astype(is_other & has_direction, observation.strata.dtype)
        strata = observation.strata * compared[None, ...]
        aligned = xp.astype(cosine > self.cosine, cosine.dtype)
        return {
            "aligned": over_strata(aligned, strata),
            "total": over_strata(cosine, strata),
            "count": over_strata(xp.ones_like(cosine), strata),
        }


@dataclass(frozen=True)
class SecondarySinks(Estimator):
    """Tokens other than the first whose state has a cosine above 0.9 with the first token's, in that layer.

    Wong et al. detect secondary sinks by this likeness to the BOS token's state: middle MLPs write it, they
    last for some layers, and draw less attention than the first token. Whether they draw any is for
    ``sink_keys`` to say. Their script takes |cos|, in the layers where the first token's norm is large. A
    state of zeros has no direction and is not compared, nor is a sequence whose first token is left out.
    Where all tokens share a direction (an embedding with a large mean) the count is near T: read
    ``first_token_cosine`` beside it.
    """

    cosine: float = 0.9

    name: ClassVar[str] = "secondary_sinks"
    title: ClassVar[str] = "Secondary sinks"
    formula: ClassVar[str] = "mean over sequences of #{t > 0 in stratum: cos(x_t, x_0) > 0.9}"
    unit: ClassVar[str] = "tokens per sequence"
    range: ClassVar[str] = "[0, T − 1]"
    floor: ClassVar[str] = "0; cosines of Gaussian noise are 0 ± 1/√d"
    ceiling: ClassVar[str] = "T − 1"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Wong et al. 2025, On the Existence and Behaviour of Secondary Attention Sinks",
            "https://arxiv.org/abs/2512.22213",
        ),
    )
    sites: ClassVar[tuple[str, ...]] = ("embedding", "residual_*")
    optional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not -1 < self.cosine < 1:
            raise EstimatorError(f"secondary_sinks: cosine is {self.cosine}; give one between −1 and 1")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SequenceCount(), FirstTokenAlignment(self.cosine))

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        aligned, count = state["first_token_alignment.aligned"], state["first_token_alignment.count"]
        xp = namespace_of(count)
        # Per sequence of all, so that the strata add up; none where no token of the stratum was compared.
        sequences = xp.broadcast_to(state["sequence.count"][..., :1], count.shape)
        sequences = xp.where(count > 0, sequences, xp.zeros_like(sequences))
        rule = f"cos(x_t, x_0) > {self.cosine:g}"
        return {
            "secondary_sink_count": Output(
                quotient(aligned, sequences),
                ("stratum",),
                self.unit,
                f"mean number of tokens t > 0 with {rule}",
                floor=0.0,
            ),
            "secondary_sink_fraction": Output(
                quotient(aligned, count),
                ("stratum",),
                definition=f"share of the tokens t > 0 with {rule}",
                floor=0.0,
                ceiling=1.0,
            ),
            "first_token_cosine": Output(
                quotient(state["first_token_alignment.total"], count),
                ("stratum",),
                definition="mean over the tokens t > 0 of cos(x_t, x_0)",
                floor=-1.0,
                ceiling=1.0,
            ),
        }
