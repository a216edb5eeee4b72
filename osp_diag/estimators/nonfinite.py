"""NaN and Inf: counted and located, since every other statistic leaves their tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.estimators._arrays import Array, accumulator_dtype, index_range, namespace_of
from osp_diag.estimators.activation import ActivationObservation, over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["NonFinite", "NonFiniteCounts"]


@dataclass(frozen=True)
class NonFiniteCounts(Measurement):
    """Number of tokens with a NaN or Inf, and position · d + channel of the first one."""

    name = "nonfinite"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"count": Field(("stratum",)), "first": Field((), "minimum")}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        raw, strata = observation.raw, observation.raw_strata
        xp = namespace_of(raw)
        wide = accumulator_dtype(xp, raw)
        batch, length, d = raw.shape
        bad = ~observation.finite_token & (strata[0, ...] > 0)
        # Tokens that are finite, or padding, get the position T, behind every other.
        # Counted from the first token that is not padding, whichever side padding is on.
        place = index_range(0, length, raw)
        start = xp.astype(observation.start, place.dtype)
        position = xp.broadcast_to(place[None, :] - start[:, None], (batch, length))
        position = xp.reshape(xp.where(bad, position, length * xp.ones_like(position)), (-1,))
        first = xp.argmin(position)
        row = xp.take(xp.reshape(raw, (batch * length, d)), xp.reshape(first, (1,)), axis=0)[0, :]
        channel = xp.argmax(xp.astype(~xp.isfinite(row), xp.int32))
        # One number for both, so that a minimum merges it: t · d + j, token first.
        place = xp.astype(xp.min(position), wide) * d + xp.astype(channel, wide)
        return {
            "count": over_strata(xp.astype(bad, wide), strata),
            "first": xp.where(xp.any(bad), place, xp.inf * xp.ones_like(place)),
        }


class NonFinite(Estimator):
    """Tokens with a NaN or Inf in any channel, and where the first one is.

    ``nonfinite_first_token`` is the lowest position in a sequence at which one appeared, counted from its
    first token that is not padding, and
    ``nonfinite_first_channel`` the lowest such channel of that token; NaN where there is none. Padding
    is not looked at. The place is exact in float64; in JAX without x64, up to T · d = 2²⁴.
    """

    name: ClassVar[str] = "nonfinite"
    title: ClassVar[str] = "NaN and Inf"
    formula: ClassVar[str] = "#{t: some x_tj is NaN or Inf}, and position and channel of the first"
    unit: ClassVar[str] = "tokens"
    range: ClassVar[str] = "[0, tokens]"
    floor: ClassVar[str] = "0"
    sources: ClassVar[tuple[Source, ...]] = (Source("osp_diag: stated here"),)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (NonFiniteCounts(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        first = state["nonfinite.first"]
        xp = namespace_of(first)
        none = xp.isinf(first)
        place = xp.where(none, xp.zeros_like(first), first)
        token = xp.floor(place / layout.channels)
        missing = xp.nan * xp.ones_like(place)
        return {
            "nonfinite_token_count": Output(
                1.0 * state["nonfinite.count"], ("stratum",), "tokens", "tokens with a NaN or Inf", floor=0.0
            ),
            "nonfinite_first_token": Output(
                xp.where(none, missing, token), (), "position", "lowest position with a NaN or Inf"
            ),
            "nonfinite_first_channel": Output(
                xp.where(none, missing, place - token * layout.channels),
                (),
                "channel",
                "lowest channel with a NaN or Inf at that position",
            ),
        }
