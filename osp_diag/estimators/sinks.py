"""Attention sinks: how much attention goes to the first token, to every other key, and to learned sinks.

A sequence's *sink key* is its first token that is not padding; positions of keys and k of the sink
rate count from it, from 0. A[i, k] is the probability that query i gives to key k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = [
    "ExtraSinkMass",
    "FirstTokenAttention",
    "FirstTokenDominance",
    "KeyMass",
    "KeyMassShare",
    "NonfiniteQueryKeyTokens",
    "SinkRate",
]

GU = Source(
    "Gu et al. 2025, When Attention Sink Emerges in Language Models", "https://arxiv.org/abs/2410.10781"
)
BARBERO = Source(
    "Barbero et al. 2025, Why do LLMs attend to the first token?", "https://arxiv.org/abs/2504.02732"
)
QIU = Source("Qiu et al. 2025, Gated Attention for Large Language Models", "https://arxiv.org/abs/2505.06708")
KAUL = Source("Kaul et al. 2024, From Attention to Activation", "https://arxiv.org/abs/2410.17174")
AN = Source(
    "An et al. 2025, Systematic Outliers in Large Language Models", "https://arxiv.org/abs/2502.06415"
)
XIAO = Source(
    "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks",
    "https://arxiv.org/abs/2309.17453",
)
GPT_OSS = Source("OpenAI 2025, gpt-oss model card", "https://arxiv.org/abs/2508.10925")
MILLER = Source(
    "Miller 2023, Attention Is Off By One", "https://www.evanmiller.org/attention-is-off-by-one.html"
)

UNIFORM_FLOOR = "uniform causal attention gives (1 + 1/2 + … + 1/n)/n: 0.074 at n = 64, 0.013 at n = 512"


@dataclass(frozen=True)
class SinkIndicators(Measurement):
    """Per sequence, whether the mean attention received by key k exceeds ε."""

    epsilons: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.8)
    sink_positions: tuple[int, ...] = (0, 1, 2, 3)
    name = "sink_rate"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "above": Field(("head", "epsilon", "sink_position")),
            "count": Field(("head", "sink_position")),
        }

    def coords(self) -> Mapping[str, tuple]:
        return {"epsilon": self.epsilons, "sink_position": self.sink_positions}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        alpha, key_weight = observation.received_attention
        xp = namespace_of(alpha)
        tokens = observation.layout.tokens
        zero = xp.zeros_like(alpha[..., 0])
        at = xp.stack([alpha[..., k] if k < tokens else zero for k in self.sink_positions], axis=-1)
        weight = xp.stack([key_weight[..., k] if k < tokens else zero for k in self.sink_positions], axis=-1)
        above = [xp.sum(xp.astype(at > e, weight.dtype) * weight, axis=0) for e in self.epsilons]
        return {"above": xp.stack(above, axis=1), "count": xp.sum(weight, axis=0)}


@dataclass(frozen=True)
class FirstTokenSums(Measurement):
    """Attention of each query to the sink key, by the query's stratum."""

    name = "first_token_attention"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        dims = ("head", "stratum")
        return {"probability": Field(dims), "dominant": Field(dims), "count": Field(dims)}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp, softmax = namespace_of(observation.valid), observation.softmax
        sees_sink = softmax.sink_logit > -xp.inf
        dominant = xp.astype(sees_sink & (softmax.sink_logit >= softmax.other_maximum), xp.float32)
        weight, strata = observation.query_weight, observation.strata

        def by_stratum(values: Array) -> Array:
            return xp.stack(
                [xp.sum(strata[s, :, None, :] * values, axis=(0, 2)) for s in range(strata.shape[0])], axis=-1
            )

        return {
            "probability": by_stratum(weight * softmax.sink_probability),
            "dominant": by_stratum(weight * dominant),
            "count": by_stratum(weight),
        }


@dataclass(frozen=True)
class ReceivedMass(Measurement):
    """Mean attention that each key receives, by its position from the sink key on."""

    name = "key_mass"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        dims = ("head", "key_position")
        return {"alpha": Field(dims), "count": Field(dims)}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        alpha, weight = observation.received_attention
        xp = namespace_of(alpha)
        return {"alpha": xp.sum(alpha * weight, axis=0), "count": xp.sum(weight, axis=0)}


@dataclass(frozen=True)
class AttentionMass(Measurement):
    """Where the attention of all valid queries goes: to keys by stratum, and to learned sinks."""

    name = "attention_mass"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"keys": Field(("head", "stratum")), "extra": Field(("head",)), "queries": Field(("head",))}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp, softmax = namespace_of(observation.valid), observation.softmax
        weight, strata = observation.query_weight, observation.key_strata
        keys = [xp.sum(strata[s, :, None, :] * softmax.key_mass, axis=(0, 2)) for s in range(strata.shape[0])]
        return {
            "keys": xp.stack(keys, axis=-1),
            "extra": xp.sum(weight * softmax.extra_probability, axis=(0, 2)),
            "queries": xp.sum(weight, axis=(0, 2)),
        }


@dataclass(frozen=True)
class NonfiniteCount(Measurement):
    """Tokens left out because of NaN or Inf."""

    name = "nonfinite_query_key_tokens"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"count": Field(())}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        return {"count": observation.nonfinite}


@dataclass(frozen=True)
class SinkRate(Estimator):
    """Share of sequences in which key k of a head receives more than ε of the attention.

    For each head and sequence α_k = 1/(n − k) Σ_{i ≥ k} A[i, k] over the n valid tokens, k counted
    from 0 at the first of them (Gu et al. count from 1); the indicator is taken per sequence, then
    averaged. With a bidirectional mask α_k averages over all n queries. The rate of a model is the
    mean over layers and heads. It falls with the sequence length: never compare across lengths.
    Behind a sliding window of w keys α_0 is at most about w / n, so that the rate is 0 by construction
    once ε exceeds it: read ``visible_sink_rate`` there, and its ``sink_key_visibility``.
    """

    epsilons: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.8)
    sink_positions: tuple[int, ...] = (0, 1, 2, 3)

    name = "sink_rate"
    title = "Sink rate"
    formula = "mean over sequences of 1(α_k > ε), α_k = 1/(n − k) Σ_{i ≥ k} A[i, k]"
    range = "[0, 1]"
    floor = f"0; {UNIFORM_FLOOR}, below every usual ε"
    ceiling = "1"
    sources = (GU, BARBERO)
    also_used_by = (
        "Gu et al. (ε = 0.3, T = 64, 100 sequences; no BOS in their own models, BOS in their script for open "
        "ones)",
        "Barbero et al. (ε = 0.8)",
        "sail-sg/Attention-Sink",
    )
    observes = "attention"
    sites = ("attention", "cross_attention")

    def __post_init__(self) -> None:
        if not self.epsilons or any(not 0 < e < 1 for e in self.epsilons):
            raise EstimatorError(f"sink_rate: epsilons {self.epsilons} must be shares between 0 and 1")
        if not self.sink_positions or any(k < 0 for k in self.sink_positions):
            raise EstimatorError(
                f"sink_rate: sink_positions {self.sink_positions} count from 0 at the first valid token"
            )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SinkIndicators(self.epsilons, self.sink_positions),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        rate = quotient(state["sink_rate.above"], state["sink_rate.count"][..., None, :])
        coords = {"epsilon": self.epsilons, "sink_position": self.sink_positions}
        return {
            "sink_rate": Output(
                rate, ("head", "epsilon", "sink_position"), "1", self.formula, coords, floor=0.0, ceiling=1.0
            )
        }


@dataclass(frozen=True)
class FirstTokenAttention(Estimator):
    """Mean attention that queries give to the sink key, by the stratum of the query.

    The sink token's own query is among the queries (it gives 1 to itself without learned sinks):
    read the stratum ``rest`` for what ordinary tokens do.
    """

    name = "first_token_attention"
    title = "First-token attention"
    formula = "mean over queries i of the stratum of A[i, sink]"
    range = "[0, 1]"
    floor = UNIFORM_FLOOR
    ceiling = "1"
    sources = (QIU,)
    also_used_by = ("Guo et al. 2024", "Sun et al. 2026 (sink ratio)")
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (FirstTokenSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = quotient(state["first_token_attention.probability"], state["first_token_attention.count"])
        coords = {"stratum": layout.strata}
        return {
            "first_token_attention": Output(mean, ("head", "stratum"), "1", self.formula, coords, ceiling=1.0)
        }


@dataclass(frozen=True)
class FirstTokenDominance(Estimator):
    """Share of queries whose most attended key is the sink key; ties go to the sink key."""

    name = "first_token_dominance"
    title = "First-token dominance"
    formula = "mean over queries i of the stratum of 1(argmax_k A[i, k] = sink)"
    range = "[0, 1]"
    floor = "1/n for one sequence of n tokens: the sink token's own query"
    ceiling = "1"
    sources = (KAUL,)
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (FirstTokenSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = quotient(state["first_token_attention.dominant"], state["first_token_attention.count"])
        coords = {"stratum": layout.strata}
        return {
            "first_token_dominance": Output(mean, ("head", "stratum"), "1", self.formula, coords, ceiling=1.0)
        }


@dataclass(frozen=True)
class KeyMass(Estimator):
    """Mean attention received by the key at each position, over sequences: exact, for every key.

    Positions count from the sequence's first valid token. The mean is over the queries that come at
    or after the key; over all valid queries if the mask is bidirectional.
    """

    name = "key_mass"
    title = "Attention received by key position"
    formula = "mean over sequences of α_k = 1/(n − k) Σ_{i ≥ k} A[i, k]"
    range = "[0, 1]"
    floor = "uniform causal attention gives (1/(n − k)) Σ_{i ≥ k} 1/(i + 1)"
    ceiling = "1"
    sources = (GU, XIAO)
    also_used_by = ("An et al. 2025 (column sums of A: attention outliers)",)
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (ReceivedMass(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = quotient(state["key_mass.alpha"], state["key_mass.count"])
        return {"key_mass": Output(mean, ("head", "key_position"), "1", self.formula, ceiling=1.0)}


@dataclass(frozen=True)
class KeyMassShare(Estimator):
    """Share of all attention mass that goes to keys of each stratum.

    ``all`` is 1 less the mass of learned sinks (and of padding keys, should the mask let them through).
    """

    name = "key_mass_share"
    title = "Share of attention by stratum of the key"
    formula = "Σ_i Σ_{k in stratum} A[i, k] / number of queries"
    range = "[0, 1]"
    ceiling = "1"
    sources = (AN,)
    also_used_by = ("Kaul et al. 2024",)
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (AttentionMass(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        share = quotient(state["attention_mass.keys"], state["attention_mass.queries"][..., None])
        coords = {"stratum": layout.strata}
        return {"key_mass_share": Output(share, ("head", "stratum"), "1", self.formula, coords, ceiling=1.0)}


@dataclass(frozen=True)
class ExtraSinkMass(Estimator):
    """Mean attention given to learned sink logits (gpt-oss) or to softmax-off-by-one's 1: a sink too."""

    name = "extra_sink_mass"
    title = "Attention to learned sinks"
    formula = "mean over queries of exp(sink logit) / (exp(sink logit) + Σ_k exp(logit_k))"
    range = "[0, 1]; 0 without learned sinks"
    floor = "0"
    ceiling = "1"
    sources = (GPT_OSS, MILLER)
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (AttentionMass(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        share = quotient(state["attention_mass.extra"], state["attention_mass.queries"])
        return {"extra_sink_mass": Output(share, ("head",), "1", self.formula, floor=0.0, ceiling=1.0)}


@dataclass(frozen=True)
class NonfiniteQueryKeyTokens(Estimator):
    """How many tokens were left out of the attention statistics because of NaN or Inf."""

    name = "nonfinite_query_key_tokens"
    title = "Tokens with a non-finite query or key"
    formula = "number of valid tokens with NaN or Inf in q or k, or NaN or +Inf among their logits"
    unit = "tokens"
    range = "0 to the number of tokens"
    floor = "0"
    sources = (Source("osp_diag"),)
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (NonfiniteCount(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        count = state["nonfinite_query_key_tokens.count"]
        return {"nonfinite_query_key_tokens": Output(count, (), self.unit, self.formula, floor=0.0)}
