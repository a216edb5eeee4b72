"""Attention outliers as An et al. count them: keys that receive a tenth of a sequence's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation, wide
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["AttentionOutlierCounts", "AttentionOutliers"]


@dataclass(frozen=True)
class AttentionOutlierCounts(Measurement):
    """Keys whose column of A, heads averaged, adds up to ``share`` of the queries, and what they get."""

    share: float = 0.1
    name = "attention_outliers"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "keys": Field(("stratum",)),
            "mass": Field(("stratum",)),
            "tokens": Field(("stratum",)),
            "sequences": Field(()),
        }

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.valid)
        queries = xp.sum(observation.query_weight, axis=-1, keepdims=True)
        # Of each head the share of its queries' attention that a key receives, then the mean over heads.
        share = observation.softmax.key_mass / xp.where(queries > 0, queries, xp.ones_like(queries))
        heads = xp.sum(xp.astype(queries > 0, share.dtype), axis=1)
        received = xp.sum(share, axis=1) / xp.where(heads > 0, heads, xp.ones_like(heads))
        counted = observation.strata * xp.astype(heads > 0, share.dtype)[None, ...]
        outlier = counted * xp.astype(received >= self.share, share.dtype)[None, ...]
        present = (heads[:, 0] > 0) & xp.any(observation.valid > 0, axis=-1)
        return {
            "keys": xp.sum(wide(outlier), axis=(1, 2)),
            "mass": xp.sum(wide(outlier * received[None, ...]), axis=(1, 2)),
            "tokens": xp.sum(wide(counted), axis=(1, 2)),
            "sequences": xp.sum(xp.astype(present, share.dtype)),
        }


@dataclass(frozen=True)
class AttentionOutliers(Estimator):
    """Number of keys that receive at least a tenth of a sequence's attention, by kind of token.

    An et al. average the heads, add up each column of A over all n queries, and call a key an outlier where
    that is 0.1 · n or more, so that a sequence has ten at most. They sort outliers into the initial token,
    strong delimiters, weakly semantic tokens and others: here into the strata, where the last two classes are
    ``rest``. Unlike α of ``sink_keys`` the denominator is all queries, also of a key that few can see: a late
    sink counts less.
    """

    share: float = 0.1

    name = "attention_outliers"
    title = "Attention outliers (An)"
    formula = "mean over sequences of #{k in stratum: Σ_i mean_h A[h, i, k] ≥ 0.1 · n}"
    unit = "keys per sequence"
    range = "[0, 10], 1/share"
    floor = "0"
    ceiling = "10, 1/share"
    sources = (
        Source(
            "An et al. 2025, Systematic Outliers in Large Language Models", "https://arxiv.org/abs/2502.06415"
        ),
    )
    also_used_by = ("`top_keys` names the tokens that receive most.", "`sink_keys` counts by head.")
    observes = "attention"
    sites = ("attention",)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise EstimatorError(f"attention_outliers: share is {self.share}; give a share between 0 and 1")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (AttentionOutlierCounts(self.share),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        keys, tokens = state["attention_outliers.keys"], state["attention_outliers.tokens"]
        xp = namespace_of(keys)
        sequences = xp.broadcast_to(state["attention_outliers.sequences"][..., None], keys.shape)
        sequences = xp.where(tokens > 0, sequences, xp.zeros_like(sequences))
        rule = f"Σ_i mean_h A[h, i, k] ≥ {self.share:g} · n"
        coords = {"stratum": layout.strata}
        return {
            "attention_outlier_count": Output(
                quotient(keys, sequences),
                ("stratum",),
                self.unit,
                f"mean number of keys with {rule}",
                coords,
                floor=0.0,
                ceiling=1 / self.share,
            ),
            "attention_outlier_mass": Output(
                quotient(state["attention_outliers.mass"], sequences),
                ("stratum",),
                "1",
                f"mean over sequences of the share of attention that keys with {rule} receive",
                coords,
                floor=0.0,
                ceiling=1.0,
            ),
        }
