"""Residual sinks: few fixed channels that hold much of most tokens' norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import (
    Array,
    accumulator_dtype,
    namespace_of,
    quotient,
    row_blocks,
    weighted_row_sum,
)
from osp_diag.estimators.activation import ActivationObservation, over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.reductions import with_union

__all__ = ["NormShareSums", "ResidualSink"]


@dataclass(frozen=True)
class NormShareSums(Measurement):
    """Sum over tokens of each channel's share x_tj² / ‖x_t‖² of the token's squared norm."""

    name = "norm_share"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"total": Field(("stratum", "channel")), "count": Field(("stratum",))}

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        x, strata, moments = observation.x, observation.strata, observation.moments
        xp = namespace_of(x)
        wide = accumulator_dtype(xp, x)
        # A token of zeros has no shares; of others z = x / max |x| neither overflows nor vanishes as a whole.
        has_norm = moments.second > 0
        scale = xp.reshape(xp.where(has_norm, moments.scale, xp.ones_like(moments.scale)), (-1,))
        square = xp.where(has_norm, moments.second, xp.ones_like(moments.second)) * x.shape[-1]
        parts = xp.where(has_norm[None, ...], strata / square[None, ...], xp.zeros_like(strata))[1:, ...]
        parts = xp.reshape(parts, (parts.shape[0], -1))
        rows = xp.reshape(x, (-1, x.shape[-1]))
        total: Array = 0.0
        for block in row_blocks(rows):
            z = rows[block, :] / scale[block, None]
            total = total + xp.astype(weighted_row_sum(parts[:, block], z * z), wide)
        counted = strata * xp.astype(has_norm, strata.dtype)[None, ...]
        return {
            "total": with_union(xp, total, xp.sum),
            "count": over_strata(xp.ones_like(moments.scale), counted),
        }


@dataclass(frozen=True)
class ResidualSink(Estimator):
    """Mean share of a token's squared norm that the few largest channels hold, the same ones for all tokens.

    Qiu et al. call residual sinks the few fixed channels that are large on most tokens; behind an RMSNorm
    they scale all others down, by √(1 − share). They draw them and give no threshold. Here m_j is the mean
    over tokens of x_tj² / ‖x_t‖², and the share is the sum of the ``top`` largest m_j. Every token counts
    alike, however large it is: ``channel_share`` weighs them by their energy, so that there one spike token
    says where the energy is. The stratum `rest` tells residual sinks; `first` the channels of the sink
    token's own spike. ``residual_sink_channel`` is the channel of the largest m_j, whose m_j is
    ``residual_sink_channel_share``. Tokens of zeros are left out.
    """

    top: int = 4

    name: ClassVar[str] = "residual_sink"
    title: ClassVar[str] = "Residual-sink share"
    formula: ClassVar[str] = "top-4 Σ_j m_j, m_j = mean_t x_tj² / ‖x_t‖²"
    range: ClassVar[str] = "[top / d, 1]"
    floor: ClassVar[str] = "top / d, all channels alike"
    ceiling: ClassVar[str] = "1"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Qiu et al. 2026, A Unified View of Attention and Residual Sinks",
            "https://arxiv.org/abs/2601.22966",
        ),
    )
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Confusable with `channel_share`, whose tokens count by their energy.",
    )
    sites: ClassVar[tuple[str, ...]] = ("embedding", "residual_*")

    def __post_init__(self) -> None:
        if self.top < 1:
            raise EstimatorError(f"top must be a positive number of channels; got {self.top}")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (NormShareSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        share = quotient(state["norm_share.total"], state["norm_share.count"][..., None])
        xp, d = namespace_of(share), layout.channels
        top = min(self.top, d)
        # NaN (no tokens) sorts last on every backend and spreads through the sum.
        ascending = xp.sort(share, axis=-1)
        largest = ascending[..., -1]
        channel = xp.astype(xp.argmax(share, axis=-1), share.dtype)
        return {
            "residual_sink_share": Output(
                xp.sum(ascending[..., d - top :], axis=-1),
                ("stratum",),
                definition=f"sum of the {self.top} largest over channels j of mean_t x_tj² / ‖x_t‖²",
                floor=top / d,
                ceiling=1.0,
            ),
            "residual_sink_channel_share": Output(
                largest,
                ("stratum",),
                definition="max_j mean_t x_tj² / ‖x_t‖²",
                floor=1.0 / d,
                ceiling=1.0,
            ),
            "residual_sink_channel": Output(
                xp.where(xp.isnan(largest), largest, channel),
                ("stratum",),
                "channel",
                "argmax_j mean_t x_tj² / ‖x_t‖²",
            ),
        }
