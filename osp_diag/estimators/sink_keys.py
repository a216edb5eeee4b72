"""Sinks wherever they are: keys at any position that receive more than ε of a head's attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.reductions import with_union

__all__ = ["SinkKeyCounts", "SinkKeys"]

GU = Source(
    "Gu et al. 2025, When Attention Sink Emerges in Language Models (α and ε, at the first positions)",
    "https://arxiv.org/abs/2410.10781",
)
SUN = Source(
    "Sun et al. 2024, Massive Activations in Large Language Models (registers and patches of ViTs)",
    "https://arxiv.org/abs/2402.17762",
)


@dataclass(frozen=True)
class SinkKeyCounts(Measurement):
    """Keys with α_k > ε, and sequences that have one, by the stratum of the key."""

    epsilons: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.8)
    minimum_queries: int = 16
    name = "sink_keys"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        dims = ("head", "epsilon", "stratum")
        return {
            "keys": Field(dims),
            "sequences": Field(dims),
            "candidates": Field(("head", "stratum")),
            "count": Field(("head",)),
        }

    def coords(self) -> Mapping[str, tuple]:
        return {"epsilon": self.epsilons}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        alpha, is_defined = observation.received_attention_in_place
        xp = namespace_of(alpha)
        is_candidate = is_defined & (observation.queries_of_key >= self.minimum_queries)
        # (stratum, batch, head, token), of the strata that do not overlap
        strata = xp.astype(is_candidate, alpha.dtype)[None, ...] * observation.strata[1:, :, None, :]
        of_all = xp.any(is_candidate & (observation.valid[:, None, :] > 0), axis=-1)
        keys, sequences = [], []
        for epsilon in self.epsilons:
            above = xp.sum(strata * xp.astype(alpha > epsilon, alpha.dtype)[None, ...], axis=-1)
            above = with_union(xp, above, xp.sum)
            keys.append(xp.sum(above, axis=1))
            sequences.append(xp.sum(xp.astype(above > 0, alpha.dtype), axis=1))
        return {
            "keys": xp.permute_dims(xp.stack(keys), (2, 0, 1)),
            "sequences": xp.permute_dims(xp.stack(sequences), (2, 0, 1)),
            "candidates": xp.permute_dims(with_union(xp, xp.sum(strata, axis=(1, 3)), xp.sum), (1, 0)),
            "count": xp.sum(xp.astype(of_all, alpha.dtype), axis=0),
        }


@dataclass(frozen=True)
class SinkKeys(Estimator):
    """How many keys of a sequence are sinks of a head, and how often it has one at all.

    α_k is what ``sink_rate`` thresholds at the first four positions, here at every one: a register or a patch
    of a vision model, an image token, a delimiter. Keys whose α averages over fewer than ``minimum_queries``
    queries are no candidates: at the end of a causal sequence few queries are left, each of which attends to
    itself, and a head that only does that has α_k = 1/(n − k). ``all`` counts each sequence once in
    ``any_sink_rate``, and is the sum of the strata in ``sink_key_count``. Both are per sequence, whatever the
    number of its tokens of a stratum; NaN where the stratum has no candidate.
    """

    epsilons: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.8)
    minimum_queries: int = 16

    name = "sink_keys"
    title = "Sinks at any position"
    formula = "mean over sequences of #{k in stratum: α_k > ε}, α_k = 1/(n − k) Σ_{i ≥ k} A[i, k]"
    unit = "keys per sequence"
    range = "[0, n]"
    floor = "0"
    ceiling = "n; with a bidirectional mask 1/ε"
    sources = (GU, SUN)
    also_used_by = (
        "`sink_rate` asks at positions 0 to 3.",
        "`attention_outliers` is An et al.'s count: heads together, all queries in the denominator.",
    )
    observes = "attention"
    sites = ("attention",)

    def __post_init__(self) -> None:
        if not self.epsilons or any(not 0 < e < 1 for e in self.epsilons):
            raise EstimatorError(f"sink_keys: epsilons {self.epsilons} must be shares between 0 and 1")
        if self.minimum_queries < 1:
            raise EstimatorError(
                f"sink_keys: minimum_queries is {self.minimum_queries}; a mean needs at least 1 query"
            )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SinkKeyCounts(self.epsilons, self.minimum_queries),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        keys, candidates = state["sink_keys.keys"], state["sink_keys.candidates"]
        xp = namespace_of(keys)
        has_candidate = xp.broadcast_to(candidates[..., None, :] > 0, keys.shape)
        count = xp.broadcast_to(state["sink_keys.count"][..., None, None], keys.shape)
        count = xp.where(has_candidate, count, xp.zeros_like(count))
        dims, coords = ("head", "epsilon", "stratum"), {"epsilon": self.epsilons, "stratum": layout.strata}
        candidate = f"keys with at least {self.minimum_queries} queries"
        return {
            "sink_key_count": Output(
                quotient(keys, count), dims, self.unit, f"{self.formula}, of {candidate}", coords, floor=0.0
            ),
            "any_sink_rate": Output(
                quotient(state["sink_keys.sequences"], count),
                dims,
                "1",
                f"share of sequences with a k in the stratum with α_k > ε, of {candidate}",
                coords,
                floor=0.0,
                ceiling=1.0,
            ),
        }
